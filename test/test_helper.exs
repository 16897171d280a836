# Nx is no dependency where it comes from VIVA_TENSOR_NX_EBIN, and nobody starts it.
if Code.ensure_loaded?(Nx), do: {:ok, _} = Application.ensure_all_started(:nx)

# Log lines are shown for the tests that fail and for no others.
# A message or a result that comes is not waited for: these are for those that never
# do, on machines where a sync takes a second.
ExUnit.start(
  capture_log: true,
  assert_receive_timeout: 120_000,
  timeout: 900_000,
  colors: [enabled: IO.ANSI.enabled?()]
)

# What tasks print is looked at as if it went into a pipe, wherever the tests run.
Application.put_env(:elixir, :ansi_enabled, false)
