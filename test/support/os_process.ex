defmodule VivaTensor.Test.OSProcess do
  @moduledoc """
  What Linux knows of the process that runs this VM.
  """

  @doc "A figure of `/proc/self/status`, such as `Threads`, or `VmHWM` in kB."
  def status(name) do
    [_, figure] = Regex.run(~r/^#{name}:\s+(\d+)/m, File.read!("/proc/self/status"))
    String.to_integer(figure)
  end

  @doc "Counts `VmHWM`, the peak of resident memory, from now on."
  def reset_peak, do: File.write!("/proc/self/clear_refs", "5")

  @doc "Seconds of all cores, in user mode and in the kernel, so far."
  def cpu_seconds do
    # In hundredths of a second, after the command's name.
    fields = File.read!("/proc/self/stat") |> String.split(") ") |> List.last() |> String.split()
    (String.to_integer(Enum.at(fields, 11)) + String.to_integer(Enum.at(fields, 12))) / 100
  end
end
