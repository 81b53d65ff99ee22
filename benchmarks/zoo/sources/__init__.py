"""Where the zoo's raw data come from: public packages, read without a download where they are installed."""
