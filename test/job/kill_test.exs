defmodule VivaTensor.Job.KillTest do
  # A few of the moments that `make faults` tries all of: VMs of their own are killed in
  # the middle of a job.
  use ExUnit.Case, async: false

  alias VivaTensor.Test.{Directory, Faults}

  @model "examples/models/viva-tiny"

  setup do
    {:ok, dir: Directory.create!()}
  end

  test "a VM that is killed loses nothing", %{dir: dir} do
    source = Faults.source!(Path.join(dir, "source/model.safetensors"), 12)
    scene = Faults.scene!(Path.join(dir, "scene"), source, format: :nf4, max_shard_size: "1MB")

    for milliseconds <- [0, 40, 90] do
      run = Faults.killed_after(scene, milliseconds)
      assert run.redone <= scene.may_redo
    end
  end

  test "nor does one that compresses vectors", %{dir: dir} do
    source = Faults.vectors!(Path.join(dir, "source/vectors.npy"), 3)
    opts = [codes: :binary, rescore: :none, queries: 5]
    scene = Faults.scene!(Path.join(dir, "scene"), source, opts)

    for milliseconds <- [0, 60] do
      run = Faults.killed_after(scene, milliseconds)
      assert run.redone <= scene.may_redo
    end

    with library when library != nil <- Faults.compile(dir) do
      calls = Faults.boundaries(scene, library)
      assert Enum.any?(calls, &(&1 =~ "codes.safetensors"))
      # In the middle of the second piece, and when the output is about to appear.
      assert Faults.killed_at(scene, library, 6, power: :cut).killed
      last = length(calls)

      for number <- [last - 6, last - 1],
          do: Faults.killed_at(scene, library, number, power: :cut)
    end
  end

  test "nor does one that is killed at a sync, or with all that was not synced", %{dir: dir} do
    opts = [format: :nf4, max_concurrency: 1, max_shard_size: "600KB"]
    scene = Faults.scene!(Path.join(dir, "scene"), @model, opts)

    case Faults.compile(dir) do
      nil ->
        IO.puts(:stderr, "\nSKIPPED: VMs killed at syncs: there is no cc to compile with")

      library ->
        calls = Faults.boundaries(scene, library)
        assert Enum.any?(calls, &(&1 =~ "fdatasync" and &1 =~ ".manifest"))
        # In the middle, and when the output is about to appear.
        assert Faults.killed_at(scene, library, 9).killed
        assert Faults.killed_at(scene, library, 14, power: :cut).killed
        last = length(calls)

        for number <- [last - 12, last - 2],
            do: Faults.killed_at(scene, library, number, power: :cut)
    end
  end

  test "nor what was there before, until the new output is", %{dir: dir} do
    scene = Faults.scene!(Path.join(dir, "scene"), @model, format: :int8, force: true)

    with library when library != nil <- Faults.compile(dir) do
      assert Faults.killed_at(scene, library, "exchange").killed
      assert Faults.killed_at(scene, library, "exchange", power: :cut).killed
    end
  end
end
