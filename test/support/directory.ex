defmodule VivaTensor.Test.Directory do
  @moduledoc """
  A directory for one test, removed after it.
  """

  def create! do
    name = "viva_tensor-#{System.os_time()}-#{System.unique_integer([:positive])}"
    path = Path.join(System.tmp_dir!(), name)
    File.mkdir_p!(path)
    ExUnit.Callbacks.on_exit(fn -> File.rm_rf!(path) end)
    path
  end
end
