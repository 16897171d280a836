defmodule VivaTensor.ApplicationTest do
  use ExUnit.Case, async: true
  doctest VivaTensor.Application

  # A node of its own, since threads are set once for a whole node.
  defp node_with(threads, code) do
    ebin = :viva_tensor |> :code.lib_dir() |> Path.join("ebin")
    code = "Application.ensure_all_started(:viva_tensor) |> #{code}"

    System.cmd(System.find_executable("elixir"), ["-pa", ebin, "-e", code],
      env: [{"VIVA_TENSOR_THREADS", threads}],
      stderr_to_stdout: true
    )
  end

  test "VIVA_TENSOR_THREADS sets the native threads" do
    code =
      "then(fn {:ok, _} -> IO.write(VivaTensor.Native.cpu() |> elem(1) |> Map.get(:threads)) end)"

    assert node_with("3", code) == {"3", 0}

    {online, 0} = node_with("", code)
    assert String.to_integer(online) == System.schedulers_online()
  end

  test "a count of threads that is none is named" do
    {output, 0} = node_with("many", "IO.inspect()")
    assert output =~ ~s(VIVA_TENSOR_THREADS take a positive integer, got \\\"many\\\")
  end
end
