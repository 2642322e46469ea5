"""Plain values in, one inline SVG out: pictures of the plan and pictures of the measurements.

There is no plotting library here, because none makes SVG without script that follows the page's colours and speaks to a
screen reader.  Colour never says anything alone, because a tenth of the readers cannot rely on it.  Whatever it says is
also said by a hatch, a glyph or a label.  Colours are CSS classes.  So one drawing serves the light and the dark
scheme.
"""
