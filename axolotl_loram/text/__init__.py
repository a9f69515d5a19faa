"""Text as token ids: training data by Axolotl, calibration, what is held out."""
