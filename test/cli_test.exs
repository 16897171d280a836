defmodule VivaTensor.CLITest do
  # Writes to standard error.
  use ExUnit.Case, async: false
  doctest VivaTensor.CLI
  doctest VivaTensor.CLI.Nodes
  doctest VivaTensor.CLI.Progress
  doctest VivaTensor.Job.FileError
  doctest VivaTensor.Job.Shard
  doctest VivaTensor.Job.Unit

  import ExUnit.CaptureIO

  alias VivaTensor.CLI.Progress

  defp status(done, state \\ :running) do
    %{
      state: state,
      tensors: 10,
      tensors_done: done,
      bytes: 1000,
      bytes_done: done * 100,
      bytes_per_second: 2.0e9,
      eta_seconds: if(done > 0, do: 7384.2)
    }
  end

  defp shown(progress, statuses) do
    capture_io(:stderr, fn ->
      statuses |> Enum.reduce(progress, &Progress.show(&2, &1)) |> Progress.finish()
    end)
  end

  test "a terminal gets one line that is drawn again" do
    output = shown(%Progress{terminal?: true}, [status(0), status(5), status(10, :finishing)])
    refute output =~ "\n"
    assert [_, start, half, full, ""] = String.split(output, "\r\e[K")
    assert start == "[........................] 0/10 tensors  0 B of 1.0 kB  2.00 GB/s"

    assert half =~
             "[############............] 5/10 tensors  500 B of 1.0 kB  2.00 GB/s  ETA 2:03:05"

    assert full =~ "[########################] 10/10 tensors"
    assert full =~ "syncing"
  end

  test "elsewhere there is a line for each tenth of the way" do
    statuses = for done <- [0, 0, 1, 1, 1, 5, 10, 10], do: status(done)
    output = shown(%Progress{terminal?: false}, statuses)
    assert [first, _, last] = String.split(output, "\n", trim: true)
    assert first =~ "1/10 tensors"
    assert last =~ "10/10 tensors"
  end
end
