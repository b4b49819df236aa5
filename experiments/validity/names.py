"""What tables and drawings call the scores of tokens. Needs Python alone, as the drawings do."""

SCORES = {
    "polarity": "polarity",
    "sampled term": "its sampled term alone",
    "STEER, signed": "STEER's score, signed",
    "covariance": "covariance (Clip-Cov)",
    "A·L": "A·L (REPO)",
    "polarity over step length": "polarity over step length",
    "calibrated": "calibrated sums",
}
