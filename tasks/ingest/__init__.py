"""Where clips come from: tables of links, the demo corpus, and the download itself."""
