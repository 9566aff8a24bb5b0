"""Reading work dirs, comparing runs, and the pages and files made of that."""
