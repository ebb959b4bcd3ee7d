"""The HTML pages: one shell, one style, one layer of charts, for reports and data statistics."""
