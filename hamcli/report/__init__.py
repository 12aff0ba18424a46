"""Records of a run, and the report.json, report.html and README.md made from them."""
