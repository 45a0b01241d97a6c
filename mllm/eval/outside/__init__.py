"""Published pictures that come inside ordinary packages, asked as yardstick-like questions."""
