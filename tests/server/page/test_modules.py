"""The page's modules alone: the stream of events, numbers in words."""

from __future__ import annotations

from typing import Any


def test_events_may_be_cut_anywhere(renderer: Any) -> None:
    """Bytes of a stream in pieces of one to five, with all three line ends and characters cut in two."""
    stream = ': hello\r\n\r\nevent: progress\rdata: {"done":1}\r\rdata: ünï €\ndata:two\n\ndata: [DONE]\n\n'.encode()
    expected = [
        {"event": "progress", "data": '{"done":1}'},
        {"event": "message", "data": "ünï €\ntwo"},
        {"event": "message", "data": "[DONE]"},
    ]
    for step in range(1, 6):
        got = renderer.evaluate(
            """async ([bytes, step]) => {
                const { events } = await import("/static/api.js");
                const body = new ReadableStream({
                    start(out) {
                        for (let at = 0; at < bytes.length; at += step) {
                            out.enqueue(new Uint8Array(bytes.slice(at, at + step)));
                        }
                        out.close();
                    },
                });
                const got = [];
                for await (const event of events(body)) got.push(event);
                return got;
            }""",
            [list(stream), step],
        )
        assert got == expected, step


def test_sizes_and_times_in_words(renderer: Any) -> None:
    said = renderer.evaluate(
        """async () => {
            const { bytes, duration, rate, count } = await import("/static/words.js");
            return [
                [0, 999, 1000, 999499, 999999, 3.53e9, 5e15].map(bytes),
                [0.2, 89, 90, 600, 5400, 7000].map(duration),
                [0.123, 7.25, 99.96, 1234.5].map(rate),
                [count(1, "token"), count(2000, "token")],
            ];
        }"""
    )
    assert said == [
        ["0 B", "999 B", "1.00 kB", "999 kB", "1.00 MB", "3.53 GB", "5,000 TB"],
        ["1 s", "89 s", "2 min", "10 min", "1 h 30 min", "1 h 57 min"],
        ["0.12 tokens/s", "7.3 tokens/s", "100 tokens/s", "1,235 tokens/s"],
        ["1 token", "2,000 tokens"],
    ]
