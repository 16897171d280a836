defmodule PlanTest do
  # The task writes to standard output.
  use ExUnit.Case, async: false

  alias VivaTensor.{Checkpoint, Job, Native, Plan}
  alias VivaTensor.Test.{Directory, Task}

  doctest VivaTensor.Plan
  doctest VivaTensor.CLI.Plan

  @model "examples/models/viva-tiny"

  test "what is estimated is what a job writes" do
    directory = Directory.create!()

    formats = [
      [format: :int8],
      [format: :nf4, double_quant: true],
      [format: :int4],
      [format: :nvfp4],
      [format: :q8_0],
      [format: :q4_k]
    ]

    plan = Plan.estimate!(@model, formats: formats)

    for {row, format} <- Enum.zip(tl(plan.rows), formats) do
      to = Path.join(directory, "#{format[:format]}")
      {:ok, job} = Job.start([source: @model, to: to] ++ format)
      {:ok, _report} = Job.await(job)
      path = if row.layout == :gguf, do: Path.join(to, "model.gguf"), else: to
      written = Checkpoint.open!(path).total_bytes
      # bitsandbytes' description of a weight is text, counted at its longest.
      slack = if format[:format] == :nf4, do: 14 * 512, else: 0
      assert row.weight_bytes in written..(written + slack), inspect({format, written})
    end
  end

  test "a configuration alone says the same as the headers" do
    directory = Directory.create!()
    File.cp!(Path.join(@model, "config.json"), Path.join(directory, "config.json"))

    for path <- [directory, Path.join(directory, "config.json")] do
      plan = Plan.estimate!(path, context: 100, batch: 2, budget: 3_000_000)
      assert %{plan | model: nil} == %{from_headers() | model: nil}
      assert plan.cache_bytes == 2 * 2 * 2 * 64 * 2 * 100 * 2
      assert [%{fits: false, spare_bytes: spare} | smaller] = plan.rows
      assert spare < 0
      assert Enum.any?(smaller, & &1.fits)
    end
  end

  defp from_headers, do: Plan.estimate!(@model, context: 100, batch: 2, budget: 3_000_000)

  test "the task shows several models side by side, and one alone" do
    argv = ["llama-7b", "llama-13b", "--context", "100", "--batch", "2", "--vram", "14GB"]
    assert {0, stdout, ""} = Task.run(Mix.Tasks.Viva.Plan, argv)
    assert stdout =~ "keys and values of 100 positions x 2; * fits in 14.00 GB"
    assert stdout =~ ~r/^format +llama-7b +llama-13b$/m
    assert stdout =~ ~r/^int8 +7\.\d\d GB \* +13\.\d\d GB \*$/m
    assert stdout =~ ~r/^bf16 +13\.\d\d GB \* +26\.\d\d GB$/m

    assert {0, stdout, ""} = Task.run(Mix.Tasks.Viva.Plan, argv ++ ["--json"])
    {:ok, [small, large]} = Native.json_decode(stdout)
    assert {small["model"], large["model"]} == {"llama-7b", "llama-13b"}

    assert {0, stdout, ""} = Task.run(Mix.Tasks.Viva.Plan, ["llama-7b", "--json"])
    assert {:ok, %{"model" => "llama-7b", "budget" => nil}} = Native.json_decode(stdout)
    assert {3, "", stderr} = Task.run(Mix.Tasks.Viva.Plan, ["llama-7b", "no/such/model"])
    assert stderr =~ "no/such/model"
    assert {2, "", _} = Task.run(Mix.Tasks.Viva.Plan, [])
  end

  test "what cannot be estimated is said" do
    directory = Directory.create!()
    config = Path.join(directory, "config.json")
    reason = fn {:error, error} -> elem(error.reason, 0) end
    assert :io == reason.(Plan.estimate("no/such/model"))
    File.write!(config, ~s({"model_type": "bert"}))
    assert :invalid_option == reason.(Plan.estimate(directory))
    File.write!(config, ~s({"model_type": "llama", "hidden_size": 0}))
    assert :invalid_option == reason.(Plan.estimate(directory))
    assert :invalid_option == reason.(Plan.estimate(@model, context: 0))
    assert :invalid_option == reason.(Plan.estimate(@model, budget: "much"))
    assert :invalid_option == reason.(Plan.estimate(@model, budgt: "1GB"))
    assert :unknown_format == reason.(Plan.estimate(@model, formats: [[format: :int9]]))
  end
end
