# Log lines are shown for the tests that fail and for no others.
ExUnit.start(capture_log: true)
