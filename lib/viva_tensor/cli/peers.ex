defmodule VivaTensor.CLI.Peers do
  @moduledoc false
  # The work behind `mix viva.bench peers`: `bench/peers/ops.py`, which times other
  # programs beside this one.

  alias VivaTensor.CLI

  @root Path.expand("../../..", __DIR__)
  @script Path.join(@root, "bench/peers/ops.py")

  @doc "Runs the script; what it prints goes to standard output as it comes."
  @spec run(keyword, String.t() | nil) :: CLI.exit_code()
  def run(flags, python \\ System.find_executable("python3"))

  def run(_flags, nil) do
    CLI.say("viva.bench", "python3 is not there; install it, with its module venv")
    1
  end

  def run(flags, python) do
    if File.exists?(@script) do
      arguments = [@script | OptionParser.to_argv(flags)]
      {_, status} = System.cmd(python, arguments, into: IO.binstream(:stdio, :line))
      min(status, 1)
    else
      CLI.say("viva.bench", "#{@script} is not there: the package goes without it")
      1
    end
  end
end
