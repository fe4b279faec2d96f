() => {
    const troubles = [];
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    if (new Set(ids).size !== ids.length) troubles.push("an id twice");
    for (const one of document.querySelectorAll("[aria-controls], [aria-describedby], [aria-labelledby], label[for]")) {
        for (const name of ["aria-controls", "aria-describedby", "aria-labelledby", "for"]) {
            const target = one.getAttribute(name);
            if (target && !document.getElementById(target)) troubles.push(`${name}=${target} leads nowhere`);
        }
    }
    for (const one of document.querySelectorAll("button, input, textarea, a, summary, progress, aside, nav, form, section")) {
        const named = one.getAttribute("aria-label") || one.hasAttribute("aria-labelledby") || one.labels?.length;
        const worded = /^(BUTTON|A|SUMMARY)$/.test(one.tagName) && /\p{L}/u.test(one.textContent);
        if (!named && !worded && one.id !== "choices" && !one.hidden && !one.matches(".editor")) troubles.push(one.outerHTML);
    }
    const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((one) => Number(one.localName[1]));
    if (levels.filter((level) => level === 1).length !== 1) troubles.push("not one h1");
    if (!document.documentElement.lang || !document.title) troubles.push("no language or title");
    for (const name of ["main", "header", "nav"]) if (!document.querySelector(name)) troubles.push(`no ${name}`);
    return troubles;
}
