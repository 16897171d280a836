defmodule VivaTensor.Test.Libraries do
  @moduledoc """
  Libraries that no Elixir has to have: what needs one of them runs where it is, and says
  aloud where it does not.
  """

  @doc "Why what needs these libraries does not run, which is told; `nil` where all are there."
  def absent(libraries, what) do
    case Enum.reject(libraries, &Code.ensure_loaded?/1) do
      [] ->
        nil

      missing ->
        reason =
          "no #{Enum.map_join(missing, ", ", &inspect/1)} here; VIVA_TENSOR_NX_EBIN says where"

        IO.puts(:stderr, "\n#{what} DOES NOT RUN: #{reason}\n")
        reason
    end
  end

  @doc "Whether they are there; else a module of tests is one that is skipped."
  def here?(libraries, module) do
    reason = absent(libraries, inspect(module))
    if reason, do: skipped(module, reason)
    reason == nil
  end

  defp skipped(module, reason) do
    contents =
      quote do
        use ExUnit.Case, async: true

        @tag skip: unquote(reason)
        test "are run" do
        end
      end

    Module.create(module, contents, Macro.Env.location(__ENV__))
  end
end
