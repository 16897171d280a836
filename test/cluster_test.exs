defmodule VivaTensor.ClusterTest do
  # Real nodes: each is an operating system process of its own.
  use ExUnit.Case, async: false

  import VivaTensor.Test.Jobs

  alias VivaTensor.{Calibration, Error, Job}
  alias VivaTensor.Test.{Cluster, Directory, Faults, Task}

  setup_all do
    Cluster.start!()
  end

  setup do
    dir = Directory.create!()
    source = Faults.source!(Path.join(dir, "source/model.safetensors"), 24)
    opts = [source: source, format: :nf4, max_shard_size: "1MB", max_concurrency: 1]
    calm = Path.join(dir, "calm")
    {:ok, _} = run([to: calm] ++ opts)
    calm = digests(calm)
    File.rm_rf!(Path.join(dir, "calm"))
    {:ok, dir: dir, opts: opts, to: Path.join(dir, "out"), calm: calm}
  end

  defp peer!(opts \\ []) do
    peer = Cluster.peer!(opts)
    on_exit(fn -> Cluster.stop(peer) end)
    peer
  end

  # A job here and on a peer that both wait in their first unit.
  defp held_on!(peer, opts) do
    hold_units()
    :ok = Cluster.hold_units(peer)
    job = start!([nodes: [peer.node]] ++ opts)
    assert_receive {:viva_tensor_job, ^job, {:node, %{state: :joined, node: node}}}
    assert node == peer.node
    {job, receive_held(peer)}
  end

  defp receive_held(peer) do
    receive do
      {:holding, worker, unit} when node(worker) == peer.node -> {worker, unit.name}
    after
      120_000 -> flunk("no unit begins on #{peer.node}")
    end
  end

  test "other nodes do units, to the same bytes", c do
    nodes = for peer <- [peer!(), peer!()], do: peer.node
    hold_units()
    job = start!([to: c.to, nodes: nodes] ++ c.opts)
    for node <- nodes, do: assert_receive({:viva_tensor_job, ^job, {:node, %{node: ^node}}})
    {:ok, status} = Job.status(job)
    assert status.nodes == Map.new(nodes, &{&1, 1})

    {:ok, report} = release_while(fn -> Job.await(job) end)
    assert digests(c.to) == c.calm
    done = Enum.frequencies_by(report.tensors, & &1[:node])
    for node <- nodes, do: assert(done[node] > 0)
    # Nothing of the job is left there.
    for node <- nodes do
      children = fn -> :erpc.call(node, DynamicSupervisor, :which_children, [Job.Supervisor]) end
      wait_until(fn -> children.() == [] end)
    end
  end

  test "the rows of a huge tensor are done by several", c do
    opts = [source: Faults.huge!(Path.join(c.dir, "huge/model.safetensors")), format: :int8]
    {:ok, _} = run([to: Path.join(c.dir, "calm")] ++ opts)
    peer = peer!()
    {job, {worker, "huge.weight"}} = held_on!(peer, [to: c.to, max_concurrency: 1] ++ opts)
    send(worker, :go)
    {:ok, report} = release_while(fn -> Job.await(job) end)
    assert digests(c.to) == digests(Path.join(c.dir, "calm"))
    nodes = for range <- row(report, "huge.weight").ranges, do: range.node
    assert peer.node in nodes and nil in nodes
  end

  test "what was chosen for groups of weights, and what was done before, is known there", c do
    peer = peer!()
    seen = Path.join(c.dir, "seen.safetensors")
    statistics!(seen, "model.layers.1.mlp.", gate_proj: 256, up_proj: 256, down_proj: 512)

    opts =
      [source: "examples/models/viva-tiny", recipe: :awq_gptq, statistics: seen] ++
        [exclude: "^(?!.*1\\.mlp\\.)", max_concurrency: 1]

    calm = Path.join(c.dir, "calm")
    {:ok, report} = run([to: calm] ++ opts)
    assert Enum.any?(report.tensors, &((&1.reason || "") =~ "divided by scales"))

    # Every unit but the first one is done on the other node.
    hold_units()
    job = start!([to: c.to, nodes: [peer.node]] ++ opts)
    wait_until(fn -> match?({:ok, %{tensors_done: 19}}, Job.status(job)) end)
    assert {:error, %Error{reason: {:cancelled, _}}} = release_while(fn -> Job.cancel(job) end)
    {:ok, job} = Job.resume(c.to, nodes: [peer.node])
    {:ok, report} = release_while(fn -> Job.await(job) end)
    assert digests(c.to) == digests(calm)
    assert Enum.count(report.tensors, & &1.verified) >= 19

    in_memory = [statistics: Calibration.load!(seen), nodes: [peer.node]]
    assert {:error, error} = Job.start([to: c.to] ++ Keyword.merge(opts, in_memory))
    assert error.message =~ "save them"
  end

  test "a node that is killed gives its units to the others", c do
    peer = peer!()
    {job, {_worker, name}} = held_on!(peer, [to: c.to] ++ c.opts)
    Cluster.signal(peer, "KILL")
    assert_receive {:viva_tensor_job, ^job, {:node, %{state: :lost}}}
    assert_receive {:viva_tensor_job, ^job, {:retry, %{work: ^name, reason: :noconnection}}}
    assert {:ok, report} = release_while(fn -> Job.await(job) end)
    assert row(report, name).attempt == 2
    assert digests(c.to) == c.calm
  end

  test "so does one that is frozen, and does no harm when it wakes up", c do
    peer = peer!()
    {job, {worker, name}} = held_on!(peer, [to: c.to] ++ c.opts)
    Cluster.signal(peer, "STOP")
    assert_receive {:viva_tensor_job, ^job, {:node, %{state: :lost}}}
    assert {:ok, report} = release_while(fn -> Job.await(job) end)
    refute Map.has_key?(row(report, name), :node)
    assert digests(c.to) == c.calm

    # Its unit, which another did long ago, goes on in a file that has its final name now.
    monitor = Process.monitor(worker)
    assert_receive {:DOWN, ^monitor, _, _, :noconnection}
    Cluster.signal(peer, "CONT")
    wait_until(fn -> Node.connect(peer.node) end)
    monitor = Process.monitor(worker)
    send(worker, :go)
    assert_receive {:DOWN, ^monitor, _, _, why} when why in [:normal, :noproc]
    assert digests(c.to) == c.calm
    assert_only(c.dir, ["source", "out"])
  end

  test "a node that comes later gets work, also one that was lost before", c do
    node = Cluster.name("late")
    hold_units()
    job = start!([to: c.to, nodes: [node]] ++ c.opts)
    assert_receive {:holding, here, _}
    assert_receive {:viva_tensor_job, ^job, {:node, %{node: ^node, state: :silent}}}

    for _ <- 1..2 do
      peer = peer!(node: node)
      :ok = Cluster.hold_units(peer)
      assert_receive {:viva_tensor_job, ^job, {:node, %{node: ^node, state: :joined}}}
      receive_held(peer)
      Cluster.stop(peer)
      assert_receive {:viva_tensor_job, ^job, {:node, %{node: ^node, state: :lost}}}
    end

    send(here, :go)
    assert {:ok, _} = release_while(fn -> Job.await(job) end)
    assert digests(c.to) == c.calm
  end

  test "with :connected any node that is there works", c do
    peer = peer!()
    true = Node.connect(peer.node)
    hold_units()
    job = start!([to: c.to, nodes: :connected] ++ c.opts)
    assert_receive {:viva_tensor_job, ^job, {:node, %{state: :joined}}}
    assert {:ok, report} = release_while(fn -> Job.await(job) end)
    assert Enum.any?(report.tensors, &(&1[:node] == peer.node))
    assert digests(c.to) == c.calm
  end

  test "mix viva.quantize takes their names, and says what becomes of them", c do
    peer = peer!()
    argv = [c.opts[:source], "--to", c.to, "--format", "nf4", "--max-shard-size", "1MB"]
    hold_units()
    :ok = Cluster.hold_units(peer)
    test = self()
    nodes = ["--nodes", "#{peer.node}"]

    pid =
      spawn_link(fn -> send(test, {:ran, Task.run(Mix.Tasks.Viva.Quantize, argv ++ nodes)}) end)

    {worker, _name} = receive_held(peer)
    send(worker, :go)

    release_while(fn ->
      monitor = Process.monitor(pid)
      receive do: ({:DOWN, ^monitor, _, _, _} -> :ok)
    end)

    assert_receive {:ran, {0, stdout, stderr}}
    assert stderr =~ "#{peer.node}: joined"
    assert stdout =~ "quantized  24 tensors"
    assert digests(c.to) == c.calm
    {2, "", stderr} = Task.run(Mix.Tasks.Viva.Quantize, argv ++ ["--nodes", "there"])
    assert stderr =~ "there is no name of a node"
  end

  test "a job that is cancelled leaves its nodes at once, and can be gone on with", c do
    peer = peer!()
    {job, {_worker, _name}} = held_on!(peer, [to: c.to] ++ c.opts)
    assert {:error, %Error{reason: {:cancelled, _}}} = release_while(fn -> Job.cancel(job) end)
    assert {:ok, _} = release_while(fn -> run([to: c.to, resume: true] ++ c.opts) end)
    assert digests(c.to) == c.calm
  end

  test "a node that sees other files is refused, and the job goes on without it", c do
    hide = ~c"mount -t tmpfs tmpfs '#{c.dir}' && exec erl \"$@\""
    {_, allowed} = System.cmd("unshare", ["-m", "mount", "-t", "tmpfs", "tmpfs", c.dir])

    if allowed == 0 do
      peer = peer!(exec: {~c"/usr/bin/unshare", [~c"-m", ~c"sh", ~c"-c", hide, ~c"sh"]})
      hold_units()
      job = start!([to: c.to, nodes: [peer.node]] ++ c.opts)
      assert_receive {:viva_tensor_job, ^job, {:node, %{state: :refused, reason: reason}}}
      assert reason =~ "model.safetensors"
      assert {:ok, _} = release_while(fn -> Job.await(job) end)
      assert digests(c.to) == c.calm
    else
      IO.puts(:stderr, "\nSKIPPED: a node without shared storage: nothing may be mounted here")
    end
  end
end
