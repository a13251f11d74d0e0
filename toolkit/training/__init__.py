"""One run: the loop, its evaluation, and the record that it leaves."""
