() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [r, g, b] = color.map((part) => {
            const c = part / 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const color = rgba(getComputedStyle(one).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255, 255];
    };
    const poor = [];
    let looked = 0;
    for (const one of document.querySelectorAll("body *")) {
        const style = getComputedStyle(one);
        if (!one.checkVisibility() || one.matches(".unseen, .skip")) continue;
        const owns = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const found = [];
        if (owns) found.push([ratio(rgba(style.color), ground(one)), 4.5]);
        if (one.matches("input[type=text], textarea")) {
            found.push([ratio(rgba(style.borderTopColor), ground(one.parentElement)), 3]);
            found.push([ratio(rgba(getComputedStyle(one, "::placeholder").color), ground(one)), 4.5]);
        }
        if (one.matches(".bar i")) found.push([ratio(rgba(style.backgroundColor), ground(one.parentElement)), 3]);
        looked += found.length;
        for (const [got, least] of found) {
            if (got < least) poor.push(`${one.outerHTML.slice(0, 80)}: ${got.toFixed(2)} < ${least}`);
        }
    }
    return [looked, poor];
}
