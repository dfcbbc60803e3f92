"""The tables, plots and pages made from the records; nothing here measures."""
