"""A page of text of several kinds, over which a loaded model's activations are measured. Written for this project."""

from __future__ import annotations

SAMPLE_TEXT = """\
The harbour was quiet before sunrise. Two fishing boats lay against the pier, their nets folded like blankets, and the
only sound was water moving under the planks. Mara counted the crates again: forty-one, not forty-two. "Somebody took
one," she said, and nobody answered. Her brother shrugged and went on coiling rope.

Question: A train leaves at 14:35 and arrives at 17:10. How long does the journey take?
Answer: From 14:35 to 17:10 are 2 hours and 35 minutes. With an average speed of 96 km/h that makes 248 km.

def moving_average(values: list[float], width: int) -> list[float]:
    if width < 1 or width > len(values):
        raise ValueError(f"width must be between 1 and {len(values)}, not {width}")
    total = sum(values[:width])
    result = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        result.append(total / width)
    return result

{"name": "sensor-7", "readings": [0.52, -1.75, 3.0e-4, 1024], "active": true, "unit": null, "tags": ["north", "roof"]}

Photosynthesis turns carbon dioxide and water into sugar and oxygen. The light-dependent reactions take place in the
thylakoid membranes; the Calvin cycle follows in the stroma. Roughly 3 to 6 percent of the light energy that falls on a
leaf ends up stored in the plant.

| item   | price | count | sum    |
|--------|-------|-------|--------|
| apples |  1.20 |    12 |  14.40 |
| bread  |  3.85 |     2 |   7.70 |
| coffee |  9.99 |     3 |  29.97 |

Der Zug nach Basel hat heute zwanzig Minuten Verspätung. Le musée est fermé le mardi, sauf pendant les vacances.
El río crece cuando se derrite la nieve. 今日は天気がいいので、公園を歩きました。 Вчера весь день шёл дождь.

1. Rinse the rice until the water stays clear.
2. Add one and a half cups of water for each cup of rice; bring it to the boil.
3. Cover, turn the heat down as far as it goes, and wait eighteen minutes. Do not lift the lid!

for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // O(n), no overflow as long as n < 2^31

To whom it may concern: the committee met on 3 March 2021, at 9 a.m., in room B-204. All but one of the seven members
were present. The motion to extend the lease by ten years was carried, five votes to one. Please see
https://example.org/minutes?year=2021&month=03 for the details, or write to office@example.org.
"""
