"""The grids that divide the attention of each bucket: chosen, measured, recalled and printed."""
