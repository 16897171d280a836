defmodule VivaTensor.Test.Jobs do
  @moduledoc """
  Jobs whose units can be watched and held, small sources, and what is left on disk.
  """

  import ExUnit.Assertions
  import ExUnit.Callbacks

  alias VivaTensor.{Calibration, Job, Telemetry, Tensor}
  alias VivaTensor.Test.Safetensors

  @doc "The result of a job."
  def run(opts) do
    {:ok, job} = Job.start(opts)
    Job.await(job)
  end

  @doc "A job that keeps the calling process informed."
  def start!(opts) do
    {:ok, job} = Job.start([notify: self()] ++ opts)
    job
  end

  @doc "Runs `fun` in the worker, before its unit touches any data."
  def at_unit_start(fun) do
    id = make_ref()

    :ok =
      Telemetry.attach(id, [[:viva_tensor, :unit, :start]], fn _, _, unit, _ -> fun.(unit) end)

    on_exit(fn -> Telemetry.detach(id) end)
    id
  end

  @doc "Workers wait at the start of their unit until they are told to go on."
  def hold_units do
    test = self()

    at_unit_start(fn unit ->
      send(test, {:holding, self(), unit})
      receive do: (:go -> :ok)
    end)
  end

  @doc "A job that has done `count` units, one at a time; all others are held."
  def held!(opts, count) do
    hold_units()
    job = start!([max_concurrency: 1] ++ opts)

    for _ <- 1..count do
      assert_receive {:holding, worker, _}
      send(worker, :go)
    end

    job
  end

  @doc "A file of three small linear weights and a norm, one with a `poison:` in it."
  def weights(path, opts \\ []) do
    Safetensors.write!(path, [
      {"layers.0.up.weight", "F32", [64, 128], Safetensors.normal(64 * 128, 1)},
      {"layers.0.down.weight", "F32", [128, 64],
       128 |> Kernel.*(64) |> Safetensors.normal(2) |> poison(opts[:poison])},
      {"layers.1.up.weight", "F32", [64, 128], Safetensors.normal(64 * 128, 3)},
      {"norm.weight", "F32", [64], Safetensors.normal(64, 4)}
    ])
  end

  defp poison(bytes, nil), do: bytes
  defp poison(bytes, what), do: Safetensors.poison(bytes, 77, what)

  @doc "The file of statistics of these layers, with their columns, of made-up activations."
  def statistics!(path, prefix, layers) do
    calibration = Calibration.new(samples: 64)

    for {layer, columns} <- layers do
      draws = for <<x::little-float-32 <- Safetensors.normal(64 * columns, columns)>>, do: x
      # A few columns that are worth a scale.
      draws =
        for {x, i} <- Enum.with_index(draws), do: if(rem(i, columns) < 8, do: 40 * x, else: x)

      x = Tensor.from_list!(draws, :f32, [64, columns])
      :ok = Calibration.add(calibration, prefix <> Atom.to_string(layer), x)
    end

    :ok = Calibration.save(calibration, path)
  end

  @doc "The row of that name."
  def row(report, name), do: Enum.find(report.tensors, &(&1.name == name))

  @doc "The rows of a report without the times and workers of its job."
  def figures(report) do
    for row <- report.tensors,
        do: Map.drop(row, [:worker, :began, :ended, :attempt, :verified, :ranges])
  end

  @doc "The target and nothing beside it: no temporary output is left."
  def assert_only(dir, names), do: assert(dir |> File.ls!() |> Enum.sort() == Enum.sort(names))

  @doc "A hash of each file of an output, the reports aside: they tell the time."
  def digests(dir) do
    for file <- File.ls!(dir), Path.rootname(file) != "report", into: %{} do
      {file, :crypto.hash(:sha256, File.read!(Path.join(dir, file)))}
    end
  end

  @doc "Lets all held workers go while `fun` runs."
  def release_while(fun) do
    task = Task.async(fun)
    release(task)
  end

  defp release(task) do
    receive do
      {:holding, worker, _} ->
        send(worker, :go)
        release(task)
    after
      5 -> Task.yield(task, 20) |> released(task)
    end
  end

  defp released({:ok, result}, _task), do: result
  defp released(nil, task), do: release(task)

  @doc """
  Starts a job, lets it record exactly `count` units, one at a time, and kills it in the
  next one.
  """
  def interrupt!(opts, count) do
    counter = :counters.new(1, [])
    test = self()

    id =
      at_unit_start(fn _unit ->
        :counters.add(counter, 1, 1)

        if :counters.get(counter, 1) > count do
          send(test, {:reached, self()})
          Process.sleep(:infinity)
        end
      end)

    job = start!([max_concurrency: 1] ++ opts)
    assert_receive {:reached, worker}
    # Recording goes on beside the units.
    wait_until(fn -> match?({_, %{recording: nil}}, :sys.get_state(job)) end)
    monitor = Process.monitor(job)
    Process.exit(job, :kill)
    assert_receive {:DOWN, ^monitor, _, _, _}
    Process.exit(worker, :kill)
    # The answer to any call shows that the news has been dealt with.
    :sys.get_state(VivaTensor.Job.Outputs)
    Telemetry.detach(id)
  end

  @doc "Waits until a condition holds."
  def wait_until(condition) do
    if not condition.() do
      Process.sleep(1)
      wait_until(condition)
    end
  end

  @doc "What a unit is called, by what telemetry tells of it."
  def called(%{rows: {first, last}, name: name}), do: "#{name} #{first} #{last}"
  def called(%{name: name}), do: name

  @doc "What the units are called that are really done while `fun` runs, and its result."
  def units_done(fun) do
    test = self()
    id = make_ref()
    event = [:viva_tensor, :unit, :stop]
    :ok = Telemetry.attach(id, [event], fn _, _, unit, _ -> send(test, {id, called(unit)}) end)
    result = fun.()
    Telemetry.detach(id)
    {Enum.sort(received(id)), result}
  end

  defp received(id) do
    receive do
      {^id, name} -> [name | received(id)]
    after
      0 -> []
    end
  end
end
