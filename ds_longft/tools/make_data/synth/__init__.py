"""Making long samples: true references hidden among near ones, needles in real documents, questions about code."""
