"""The stage after block tuning: all blocks learn together by what the model predicts, one in memory."""
