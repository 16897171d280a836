# Log lines are shown for the tests that fail and for no others.
# A loaded machine is slow to send messages; none that comes is waited for long.
ExUnit.start(capture_log: true, assert_receive_timeout: 2_000)
