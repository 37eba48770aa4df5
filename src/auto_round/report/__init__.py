"""The report of a run as a page that a person can look at, and the records that it is made of."""
