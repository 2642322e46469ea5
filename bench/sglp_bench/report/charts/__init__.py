"""Plain values in, one inline SVG out: pictures of the plan and pictures of the measurements.

No plotting library, because none makes SVG without script that follows the page's colours and speaks to a screen
reader.  No colour alone, because a tenth of the readers cannot rely on it: whatever colour says is also said by a
hatch, a glyph or a label.  Colours are CSS classes, so one drawing serves the light and the dark scheme.
"""
