defmodule VivaTensor.Test.Directory do
  @moduledoc """
  A directory for one test, removed after it.

  It is in memory where there is room, so that a disk which takes long to sync does not
  hold up thousands of jobs; `make faults` runs on the disk.
  """

  @memory "/dev/shm"
  @room_kb 2 * 1024 * 1024

  def create! do
    name = "viva_tensor-#{System.os_time()}-#{System.unique_integer([:positive])}"
    path = Path.join(parent(), name)
    File.mkdir_p!(path)
    ExUnit.Callbacks.on_exit(fn -> File.rm_rf!(path) end)
    path
  end

  defp parent do
    with {:ok, %{access: :read_write}} <- File.stat(@memory),
         {listing, 0} <- System.cmd("df", ["-Pk", @memory], stderr_to_stdout: true),
         [_, free] <- Regex.run(~r/\s(\d+)\s+\d+%/, listing),
         true <- String.to_integer(free) >= @room_kb do
      @memory
    else
      _ -> System.tmp_dir!()
    end
  end
end
