defmodule VivaTensor.Test.Task do
  @moduledoc false

  import ExUnit.CaptureIO

  @doc "Runs a mix task: `{exit code, standard output, standard error}`."
  def run(module, argv) do
    test = self()

    stderr =
      capture_io(:stderr, fn ->
        stdout = capture_io(fn -> send(test, {:code, exit_code(module, argv)}) end)
        send(test, {:stdout, stdout})
      end)

    code = receive(do: ({:code, code} -> code))
    stdout = receive(do: ({:stdout, stdout} -> stdout))
    {code, stdout, stderr}
  end

  defp exit_code(module, argv) do
    module.run(argv)
    0
  catch
    :exit, {:shutdown, code} -> code
  end
end
