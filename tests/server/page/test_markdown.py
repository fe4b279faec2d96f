"""Markdown and hostile text: what a model may write, and how it is shown."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
from tests.server.page.fake_server import FakeServer, delta, ending, words
from tests.server.page.hands import ask, drop, expect, last, settled

HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>

<svg onload=window.hacked=1> &lt;b&gt; **<iframe srcdoc="<script>parent.hacked=1</script>">**

[a](javascript:window.hacked=1) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) [d]( vbscript:x) ![e](https://evil.test/x.png)

[f](https://ok.test/"onmouseover="hacked=1) [g](//evil.test) <https://ok.test/><style>*{display:none}</style>

| <b>x</b> | [h](javascript:1) |
|---|---|
| <img src=x onerror=hacked=1> | `<script>` |

- <details open ontoggle=hacked=1>

> # <h1 onclick=hacked=1>

```"><script>hacked=1</script>
</code></pre><script>window.hacked=1</script>
```
"""


def test_text_stays_text(tab: Any, server: FakeServer) -> None:
    thoughts = [delta(reasoning_content=HOSTILE[at : at + 7]) for at in range(0, len(HOSTILE), 7)]
    server.play([*thoughts, *words(HOSTILE), ending()])
    drop(tab, '"><img src=x onerror=hacked=1>.txt', HOSTILE.encode())
    ask(tab, HOSTILE)
    settled(tab)
    last(tab).locator("summary").click()
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.hacked") is None
    made = tab.evaluate("[...new Set([...document.querySelectorAll('main *')].map(one => one.localName))]")
    assert not {"img", "script", "svg", "iframe", "style", "b", "object", "embed"} & set(made)
    links = tab.eval_on_selector_all("main a", "all => all.map(one => [one.protocol, one.rel, one.target])")
    assert len(links) >= 3
    assert {tuple(link) for link in links} == {("https:", "noopener noreferrer nofollow", "_blank")}
    inside = tab.evaluate("[...document.querySelectorAll('article *')].flatMap(one => one.getAttributeNames())")
    assert not [name for name in inside if name.startswith("on") or name in ("style", "src", "srcdoc")]
    expect(last(tab)).to_contain_text('<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>')
    expect(tab.locator(".asked")).to_have_text(HOSTILE.strip(), use_inner_text=False)


def test_the_policy_holds(tab: Any) -> None:
    """Whatever our scripts get wrong: no inline script, no markup from a string, no other origin."""
    assert tab.evaluate(
        """async () => {
            const script = document.createElement("script");
            let refused = "";
            try { script.textContent = "window.hacked = 1"; } catch (error) { refused += "text "; }
            document.body.append(script);
            try { document.body.innerHTML = "<p>x</p>"; } catch (error) { refused += "markup "; }
            try {
                document.body.setAttribute("onclick", "window.hacked = 1");
                document.body.click();
            } catch (error) { refused += "handler "; }
            try { await fetch("data:text/plain,x"); } catch (error) { refused += "fetch"; }
            return [refused, window.hacked ?? null];
        }"""
    ) == ["text markup handler fetch", None]


# --------------------------------------------------------------------------------------------------- markdown

RENDER = """async (pieces) => {
    const { Markdown } = await import("/static/markdown.js");
    const box = document.createElement("div");
    const heard = [];
    const writer = new Markdown(box, (words) => heard.push(words));
    for (const piece of pieces) writer.push(piece);
    writer.end();
    for (const one of box.querySelectorAll("button")) one.remove();
    return [box.innerHTML, heard];
}"""

A = 'target="_blank" rel="noopener noreferrer nofollow"'
EXAMPLES = [
    ("plain", "<p>plain</p>"),
    ("two\nlines\n\nnext", "<p>two\nlines</p><p>next</p>"),
    ("# One\n## Two ##\n###### Six\n#no", "<h3>One</h3><h4>Two</h4><h6>Six</h6><p>#no</p>"),
    ("**b** *i* ***bi*** ~~d~~", "<p><strong>b</strong> <em>i</em> <strong><em>bi</em></strong> <del>d</del></p>"),
    ("snake_case_name _i_ __b__", "<p>snake_case_name <em>i</em> <strong>b</strong></p>"),
    ("2 * 3 * 4 and 2*3*4", "<p>2 * 3 * 4 and 2<em>3</em>4</p>"),
    ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
    ("**open *and `code", "<p>**open *and `code</p>"),
    ("`a*b*` ``x ` y`` `` `z` ``", "<p><code>a*b*</code> <code>x ` y</code> <code>`z`</code></p>"),
    ("**`**k`**", "<p><strong><code>**k</code></strong></p>"),
    (r"\*no\* \\ \q", r"<p>*no* \ \q</p>"),
    ("[t](https://a.b/c_(d)?e=1)", f'<p><a href="https://a.b/c_(d)?e=1" {A}>t</a></p>'),
    ("see https://a.b/x_y. (https://c.d)", f'<p>see <a href="https://a.b/x_y" {A}>https://a.b/x_y</a>. '
        f'(<a href="https://c.d" {A}>https://c.d</a>)</p>'),
    ("[https://a.b](https://c.d)", f'<p><a href="https://c.d" {A}>https://a.b</a></p>'),
    ("[x](ftp://a.b) [y] (z)", "<p>[x](ftp://a.b) [y] (z)</p>"),
    ("- a\n- b\n  - c\n  - d\n- e", "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>"),
    ("1. a\n2. b\n   - c", "<ol><li>a</li><li>b<ul><li>c</li></ul></li></ol>"),
    ("3) a\n\n4) b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("- a\n\n  more\n\n      deep\n- b", "<ul><li>a<p>more</p><p>deep</p></li><li>b</li></ul>"),
    ("- a\nlazy\n\nafter", "<ul><li>a\nlazy</li></ul><p>after</p>"),
    ("1. x\n   ```py\n   if y:\n       z\n   ```\n2. w", '<ol><li>x<figure class="code"><figcaption><span>py</span>'
        '</figcaption><pre tabindex="0" aria-label="Code in py"><code>if y:\n    z</code></pre></figure></li>'
        "<li>w</li></ol>"),
    ("in\n1984. no list", "<p>in\n1984. no list</p>"),
    ("> q\n> > r\n\np", "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote><p>p</p>"),
    ("a\n\n---\n\nb\n* * *", "<p>a</p><hr><p>b</p><hr>"),
    ("```\na\n\n  <b>\n```\nafter", '<figure class="code"><figcaption><span>text</span></figcaption>'
        '<pre tabindex="0" aria-label="Code"><code>a\n\n  &lt;b&gt;</code></pre></figure><p>after</p>'),
    ("~~~~ c\n~~~\n~~~~", '<figure class="code"><figcaption><span>c</span></figcaption>'
        '<pre tabindex="0" aria-label="Code in c"><code>~~~</code></pre></figure>'),
    ("|a|b|\n|:-:|--:|\n|1|`x\\|y`|\n|2|\n\nz", '<div class="table" role="region" aria-label="Table" tabindex="0">'
        '<table><thead><tr><th class="middle">a</th><th class="right">b</th></tr></thead><tbody><tr>'
        '<td class="middle">1</td><td class="right"><code>x|y</code></td></tr><tr><td class="middle">2</td>'
        '<td class="right"></td></tr></tbody></table></div><p>z</p>'),
    ("a | b\nno table", "<p>a | b\nno table</p>"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "html"), EXAMPLES)
def test_markdown(renderer: Any, text: str, html: str) -> None:
    assert renderer.evaluate(RENDER, [text])[0] == html


def test_any_cutting_of_the_text_gives_the_same_page(renderer: Any) -> None:
    """Each text token by token, and all of them in one with random cuts: what is final never had to change."""
    whole = "\n\n".join(text for text, _ in EXAMPLES) + "\n" + HOSTILE
    rng = random.Random(7)
    for text in (*(text for text, _ in EXAMPLES), HOSTILE):
        assert renderer.evaluate(RENDER, list(text)) == renderer.evaluate(RENDER, [text]), text
    expected = renderer.evaluate(RENDER, [whole])
    for most in (1, 3, 20, 200):
        pieces, rest = [], whole
        while rest:
            cut = rng.randint(1, most)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        assert renderer.evaluate(RENDER, pieces) == expected


def test_random_markdown_cut_anywhere(renderer: Any) -> None:
    rng = random.Random(11)
    marks = [
        "a",
        "b c",
        "\n",
        "\n\n",
        "- ",
        "1. ",
        "2. ",
        "  ",
        "> ",
        "```",
        "~~~",
        "`",
        "**",
        "*",
        "_",
        "|",
        "|-|-|\n",
        "# ",
    ]
    texts = ["".join(rng.choices(marks, k=rng.randint(1, 40))) for _ in range(400)]
    together = """async (texts) => {
        const { Markdown } = await import("/static/markdown.js");
        const shown = (pieces) => {
            const box = document.createElement("div");
            const writer = new Markdown(box);
            for (const piece of pieces) writer.push(piece);
            writer.end();
            return box.innerHTML;
        };
        return texts.filter((text) => shown([text]) !== shown([...text]));
    }"""
    assert renderer.evaluate(together, texts) == []


HOSTILE_PIECES = [
    *("*", "**a ", "*a_b ", "*a* **b** ", "__a", "~~", "\\", "`", "`a``b ", "<a>", "(((", "https://"),
    *("[", "[](", "![a](b", "[a](https://(", "> ", "- ", "  - x\n", "1. \n", "# ", " " * 50, "\n"),
    *("|", "|a|\n|-|\n", "```\n"),
]


@pytest.mark.parametrize("piece", HOSTILE_PIECES)
def test_markdown_takes_hostile_text_in_its_stride(renderer: Any, piece: str) -> None:
    """100 kB of the same few characters: well under a second where a quadratic rule would take minutes."""
    text = piece * (100_000 // len(piece))
    begun = time.monotonic()
    renderer.evaluate(RENDER, [text])
    assert time.monotonic() - begun < 5


def test_a_long_answer_costs_little_while_it_comes(renderer: Any) -> None:
    """20,000 pieces of code and paragraphs: only the last block is made anew."""
    text = ("A paragraph of some words, and `code`.\n\n" * 10 + "```\n" + "a line of code;\n" * 30 + "```\n\n") * 60
    begun = time.monotonic()
    renderer.evaluate(RENDER, [text[at : at + 4] for at in range(0, len(text), 4)])
    assert time.monotonic() - begun < 15


def test_code_can_be_copied_while_more_comes(opened: Any, server: FakeServer) -> None:
    tab = opened(permissions=["clipboard-read", "clipboard-write"])
    gate = threading.Event()
    server.play([*words("```py\nx = 1\n"), gate, *words("y = 2\n```\n"), ending()])
    ask(tab, "Code?")
    expect(last(tab).locator("code")).to_have_text("x = 1\n", use_inner_text=False)
    button = last(tab).locator("figure").get_by_role("button", name="Copy").element_handle()
    gate.set()
    expect(last(tab).locator("code")).to_have_text("x = 1\ny = 2")
    settled(tab)
    last(tab).locator("figure").get_by_role("button", name="Copy").click()
    expect(last(tab).locator("figcaption")).to_contain_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == "x = 1\ny = 2"
    assert button is not None
    last(tab).locator(".tools").get_by_role("button", name="Copy").click()
    tab.wait_for_timeout(100)
    assert tab.evaluate("navigator.clipboard.readText()") == "```py\nx = 1\ny = 2\n```\n"
