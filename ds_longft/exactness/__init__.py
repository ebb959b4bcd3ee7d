"""Is what is trained what one process would have computed? Each module asks one question and answers with findings."""
