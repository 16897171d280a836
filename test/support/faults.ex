defmodule VivaTensor.Test.Faults do
  @moduledoc """
  Jobs in VMs of their own that are killed, and what goes on with them.

  Every function takes a scene, see `scene!/3`, leaves its directory as it was, and
  raises when a byte is lost or wrong.
  """

  alias VivaTensor.{Job, Telemetry}
  alias VivaTensor.Job.Manifest
  alias VivaTensor.Test.{Cluster, Jobs, Safetensors}

  @source "test/faults/boundaries.c"
  @old "what was there before"
  @patience_ms 600_000

  @doc """
  A source, of weights or of vectors, and a recipe in a directory of their own, with what a
  job makes of them when nothing interrupts it.
  """
  def scene!(dir, source, opts) do
    File.mkdir_p!(dir)
    # As the kernel names it to the library that counts calls below it.
    {dir, 0} = System.cmd("realpath", [dir])
    dir = String.trim(dir)
    {kind, workers} = if opts[:codes], do: {:vectors, 1}, else: {:source, workers(opts)}
    opts = [{kind, Path.expand(source)} | opts]
    calm = Path.join(dir, "calm")
    {:ok, job} = Job.start([to: calm, notify: self()] ++ opts)
    {:ok, _report} = Job.await(job)
    digests = Jobs.digests(calm)
    File.rm_rf!(calm)
    sizes = for row <- rows(job), unit <- units(row), into: %{}, do: unit

    %{
      dir: dir,
      to: Path.join(dir, "out"),
      opts: opts,
      digests: digests,
      sizes: sizes,
      may_redo: workers * (sizes |> Map.values() |> Enum.max())
    }
  end

  defp workers(opts), do: Keyword.get(opts, :max_concurrency, System.schedulers_online())

  defp rows(job) do
    receive do
      {:viva_tensor_job, ^job, {:unit, row}} -> [row | rows(job)]
    after
      0 -> []
    end
  end

  # What each unit of a row is called, and the bytes that it reads.
  defp units(%{ranges: ranges} = row) do
    for %{rows: [first, last]} <- ranges do
      unit = Jobs.called(%{name: row.name, rows: {first, last}})
      {unit, div(row.input_bytes, hd(row.shape)) * (last - first)}
    end
  end

  defp units(row), do: [{row.name, row.input_bytes}]

  @doc "A matrix of vectors in f16, 8 MB for each of `count` pieces, and a bit."
  def vectors!(path, count) do
    dimension = 4096
    vectors = 1024 * count + 50
    header = "{'descr': '<f2', 'fortran_order': False, 'shape': (#{vectors}, #{dimension}), }"
    header = String.pad_trailing(header, 117) <> "\n"

    noise =
      for <<x::little-float-32 <- Safetensors.normal(dimension, 2)>>,
        into: <<>>,
        do: <<x::little-float-16>>

    rows =
      for n <- 0..(vectors - 1) do
        cut = rem(n * 74, byte_size(noise))
        [binary_part(noise, cut, byte_size(noise) - cut), binary_part(noise, 0, cut)]
      end

    File.mkdir_p!(Path.dirname(path))
    File.write!(path, [<<0x93, "NUMPY", 1, 0, byte_size(header)::little-16>>, header | rows])
    path
  end

  @doc "A checkpoint of `count` matrices of 1 MB, in f32."
  def source!(path, count) do
    noise = Safetensors.normal(64 * 1024, 1)

    tensors =
      for n <- 1..count do
        shift = rem(n * 4096, byte_size(noise))
        tail = binary_part(noise, shift, byte_size(noise) - shift)
        bytes = :binary.copy(tail <> binary_part(noise, 0, shift), 4)
        {"layers.#{n}.weight", "F32", [256, 1024], bytes}
      end

    Safetensors.write!(path, tensors)
  end

  @doc """
  A checkpoint of one matrix of 160 MB, of which a unit does 64 MiB, and a small one.
  """
  def huge!(path, change \\ & &1) do
    # No two rows are the same, nor are any two ranges.
    noise = Safetensors.normal(100_003, 1)
    bytes = noise |> :binary.copy(410) |> binary_part(0, 4 * 40_000 * 1024)
    norm = {"norm.weight", "F32", [64], Safetensors.normal(64, 4)}
    Safetensors.write!(path, [{"huge.weight", "F32", [40_000, 1024], change.(bytes)}, norm])
  end

  @doc """
  Kills a VM a while after its job has begun. `fun` may then change what is left, and says
  whether there was anything to change.
  """
  def killed_after(scene, milliseconds, fun \\ fn -> true end) do
    log = Path.join(scene.dir, "units")
    port = victim(scene, [], log)
    begun(port)
    Process.sleep(milliseconds)
    {:os_pid, pid} = Port.info(port, :os_pid) || {:os_pid, nil}
    # Every shell has kill, not every system a program of that name.
    if pid, do: System.cmd("sh", ["-c", "kill -9 #{pid}"], stderr_to_stdout: true)
    code = exit_status(port)
    changed = fun.()
    finished = if File.exists?(log), do: log |> File.read!() |> String.split("\n"), else: []
    again = go_on!(scene)
    redone = Enum.sum(for name <- again, name in finished, do: scene.sizes[name])
    clean!(scene)
    %{killed: code == 137, changed: changed, redone: redone}
  end

  @doc "How long a job takes in a VM of its own, in milliseconds."
  def duration(scene) do
    port = victim(scene, [], Path.join(scene.dir, "units"))
    begun(port)
    start = System.monotonic_time(:millisecond)
    0 = exit_status(port)
    duration = System.monotonic_time(:millisecond) - start
    clean!(scene)
    duration
  end

  @doc """
  The library that ends a VM at a sync or rename, compiled into a directory, or nil where
  nothing compiles it.
  """
  def compile(dir) do
    if compiler = System.find_executable("cc") do
      path = Path.join(dir, "boundaries.so")

      {_, 0} = System.cmd(compiler, ~w(-Wall -Werror -shared -fPIC -o) ++ [path, @source, "-ldl"])

      path
    end
  end

  @doc "The syncs and renames of a job that nothing interrupts, in order."
  def boundaries(scene, library) do
    calls = Path.join(scene.dir, "calls")
    port = victim(scene, preload(scene, library) ++ [{"BOUNDARY_LOG", calls}], nil)
    0 = exit_status(port)
    lines = calls |> File.read!() |> String.split("\n", trim: true)
    clean!(scene)
    lines
  end

  @doc """
  Kills a VM before its sync or rename of that number, or of that name; with `power: :cut`, what was not
  synced by then is lost.
  """
  def killed_at(scene, library, number, opts \\ []) do
    shadow = shadow!(scene)

    env =
      preload(scene, library) ++
        [{"BOUNDARY_KILL", "#{number}"}, {"BOUNDARY_SHADOW", shadow}]

    port = victim(scene, env, nil)
    code = exit_status(port)
    if opts[:power] == :cut, do: drop_unsynced(scene.dir, shadow, [shadow])
    File.rm_rf!(shadow)
    if scene.opts[:force], do: old_or_whole!(scene)
    go_on!(scene)
    clean!(scene)
    %{killed: code == 137}
  end

  # What is durable when the VM begins: the output that the job is to replace, if any.
  defp shadow!(scene) do
    shadow = Path.join(scene.dir, "shadow")
    File.mkdir_p!(shadow)
    if scene.opts[:force], do: old!(scene, shadow)
    shadow
  end

  defp old!(scene, shadow) do
    file = Path.join(scene.to, @old)
    File.mkdir_p!(scene.to)
    File.write!(file, @old)
    [of_file, of_to, of_dir] = for path <- [file, scene.to, scene.dir], do: File.stat!(path).inode
    File.write!(Path.join(shadow, "#{of_file}"), @old)
    File.write!(Path.join(shadow, "#{of_to}"), "#{of_file} #{@old}\n")
    File.write!(Path.join(shadow, "#{of_dir}"), "#{of_to} #{Path.basename(scene.to)}\n")
  end

  defp old_or_whole!(scene) do
    there = scene.to |> Jobs.digests() |> Map.delete(".manifest")

    if there not in [scene.digests, %{@old => :crypto.hash(:sha256, @old)}],
      do: raise("neither the old output nor the whole new one: #{inspect(there)}")
  end

  @doc """
  Fills a disk in the middle of a job, makes room and goes on: with more and more room to
  begin with, until it is enough. Returns how often it was not, or `:not_allowed` where no
  file system may be mounted.
  """
  def full_disk(scene) do
    disk = Path.join(scene.dir, "disk")
    File.mkdir_p!(disk)

    script = """
    mount -t tmpfs -o size=$1k tmpfs "$2" || exit 98
    shift; disk=$1; shift
    "$@" >&2; first=$?
    mount -o remount,size=1g "$disk" || exit 97
    if [ $first -ne 0 ]; then "$@" || exit 96; fi
    mkdir -p "$disk.copy" && cp -a "$disk"/. "$disk.copy" && exit $first
    """

    elixir = victim_command(%{scene | to: Path.join(disk, "out")}, [resume: true], nil)

    run = fn kilobytes ->
      unshare = ~w(-m sh -c) ++ [script, "sh", "#{kilobytes}", disk | elixir]
      {output, code} = System.cmd("unshare", unshare, stderr_to_stdout: true)
      copy = disk <> ".copy"

      if code in [0, 1] do
        if Jobs.digests(Path.join(copy, "out")) != scene.digests, do: raise("wrong bytes")
        if File.ls!(copy) != ["out"], do: raise("left: #{inspect(File.ls!(copy))}")
        File.rm_rf!(copy)
      end

      {code, output}
    end

    result = full_until_enough(run, 500, 0)
    clean!(scene)
    result
  end

  defp full_until_enough(run, kilobytes, full) do
    case run.(kilobytes) do
      {0, _} -> full
      {1, _} -> full_until_enough(run, kilobytes + 1_500, full + 1)
      {98, _} when full == 0 -> :not_allowed
      {code, output} -> raise "exit code #{code}: #{output}"
    end
  end

  @doc """
  Changes a byte of the source that a unit was made from, and puts it back when going on
  was refused by the tensor's name; false where no unit was recorded.
  """
  def refuses_another_source!(scene) do
    with {:ok, records, _} <- Manifest.read(Path.join(scene.dir, ".out.partial/.manifest")),
         [name | _] <- for({:unit, _, name, _} <- records, do: name) do
      source = scene.opts[:source]
      content = File.read!(source)
      {_, _, bytes} = Safetensors.read!(source)[name]
      {at, _} = :binary.match(content, bytes)
      File.write!(source, flip(content, at))

      {:error, %{op: :source, reason: {:changed, %{changes: [%{what: ^name}]}}}} =
        Jobs.run([to: scene.to, resume: true] ++ scene.opts)

      File.write!(source, content)
      true
    else
      _nothing -> false
    end
  end

  @doc "Bytes with another one at `at`."
  def flip(bytes, at) do
    {head, tail} =
      {binary_part(bytes, 0, at), binary_part(bytes, at + 1, byte_size(bytes) - at - 1)}

    <<head::binary, 255 - :binary.at(bytes, at), tail::binary>>
  end

  @doc "Kills a worker of a job, waits, and so on until the job ends."
  def kill_workers(job, wait) do
    wait.()

    case Job.status(job) do
      {:ok, %{state: :done}} ->
        :ok

      {:ok, _} ->
        case Task.Supervisor.children(VivaTensor.Job.Workers) do
          [] -> :ok
          pids -> pids |> Enum.random() |> Process.exit(:kill)
        end

        kill_workers(job, wait)
    end
  end

  @doc """
  Sends a signal to another node that does units of a job, a while after it joined; one
  that was frozen wakes up when the job is done.
  """
  def lost_node(scene, signal, milliseconds) do
    peer = Cluster.peer!()
    # So that there is something left for the node.
    slow = fn _, _, _, _ -> Process.sleep(20) end
    :ok = Telemetry.attach(:slow, [[:viva_tensor, :unit, :start]], slow)
    {:ok, job} = Job.start([to: scene.to, nodes: [peer.node], notify: self()] ++ scene.opts)
    receive do: ({:viva_tensor_job, ^job, {:node, %{state: :joined}}} -> :ok)
    Process.sleep(milliseconds)
    Cluster.signal(peer, signal)
    {:ok, _report} = Job.await(job)
    Telemetry.detach(:slow)
    if signal == "STOP", do: Cluster.signal(peer, "CONT")
    # Units that it had begun go on there.
    Process.sleep(200)
    if Jobs.digests(scene.to) != scene.digests, do: raise("wrong bytes in #{scene.to}")
    Cluster.stop(peer)
    clean!(scene)
    %{killed: lost?(job), changed: true}
  end

  defp lost?(job) do
    receive do
      {:viva_tensor_job, ^job, {:node, %{state: :lost}}} -> true
      {:viva_tensor_job, ^job, {:done, _}} -> false
    end
  end

  defp preload(scene, library), do: [{"LD_PRELOAD", library}, {"BOUNDARY_UNDER", scene.dir}]

  # Goes on to the bytes of a job that nothing interrupted; returns the units that it did.
  defp go_on!(scene) do
    {again, result} =
      Jobs.units_done(fn -> Jobs.run([to: scene.to, resume: true] ++ scene.opts) end)

    {:ok, _report} = result

    if Jobs.digests(scene.to) != scene.digests, do: raise("wrong bytes in #{scene.to}")
    left = for name <- File.ls!(scene.dir), String.starts_with?(name, ".out"), do: name
    if left != [], do: raise("left: #{inspect(left)}")
    again
  end

  defp clean!(scene) do
    for name <- File.ls!(scene.dir), do: File.rm_rf!(Path.join(scene.dir, name))
    :ok
  end

  # The other VM

  defp victim(scene, env, log) do
    [elixir | args] = victim_command(scene, [], log)
    env = for {name, value} <- env, do: {to_charlist(name), to_charlist(value)}
    options = [:binary, :exit_status, :stderr_to_stdout, env: env, args: args]
    Port.open({:spawn_executable, elixir}, options)
  end

  defp victim_command(scene, opts, log) do
    ebin = :viva_tensor |> :code.lib_dir() |> Path.join("ebin")
    job = :erlang.term_to_binary({[to: scene.to] ++ opts ++ scene.opts, log})
    code = "VivaTensor.Test.Faults.run_victim(System.argv())"
    [System.find_executable("elixir"), "-pa", ebin, "-e", code, "--", Base.encode64(job)]
  end

  @doc "Runs a job in this VM, and halts."
  def run_victim([job]) do
    {opts, log} = job |> Base.decode64!() |> :erlang.binary_to_term()
    {:ok, _} = Application.ensure_all_started(:viva_tensor)

    if log do
      event = [:viva_tensor, :unit, :stop]
      write = fn _, _, unit, _ -> File.write!(log, Jobs.called(unit) <> "\n", [:append]) end
      :ok = Telemetry.attach(:log, [event], write)
    end

    IO.puts("begun")
    {:ok, job} = Job.start(opts)

    case Job.await(job) do
      {:ok, _report} -> System.halt(0)
      {:error, error} -> System.halt(if error.op in [:output, :unit], do: 1, else: 2)
    end
  end

  defp begun(port) do
    receive do
      {^port, {:data, "begun" <> _}} -> :ok
    after
      @patience_ms -> raise "a VM does not begin"
    end
  end

  defp exit_status(port) do
    receive do
      {^port, {:exit_status, code}} -> code
    after
      @patience_ms -> raise "a VM hangs"
    end
  end

  # A power cut

  # Files get back what they held when they were last synced, and directories the names.
  defp drop_unsynced(directory, shadow, except) do
    names =
      for name <- File.ls!(directory),
          path = Path.join(directory, name),
          path not in except,
          do: {name, path}

    inodes = Map.new(names, fn {name, path} -> {File.stat!(path).inode, {name, path}} end)

    case File.read(Path.join(shadow, "#{File.stat!(directory).inode}")) do
      {:ok, listing} ->
        synced =
          for line <- String.split(listing, "\n", trim: true), into: %{} do
            [inode, name] = String.split(line, " ", parts: 2)
            {String.to_integer(inode), name}
          end

        # In two steps, since two may have changed places.
        for {inode, {_, path}} <- inodes, is_map_key(synced, inode) do
          File.rename!(path, path <> ".moving")
        end

        for {inode, {_, path}} <- inodes do
          case Map.fetch(synced, inode) do
            {:ok, name} -> File.rename!(path <> ".moving", Path.join(directory, name))
            :error -> File.rm_rf!(path)
          end
        end

      {:error, :enoent} ->
        :ok
    end

    for name <- File.ls!(directory), path = Path.join(directory, name), path not in except do
      if File.dir?(path),
        do: drop_unsynced(path, shadow, except),
        else: drop_content(path, shadow)
    end
  end

  defp drop_content(path, shadow) do
    stat = File.stat!(path)

    content =
      case File.read(Path.join(shadow, "#{stat.inode}")) do
        {:ok, synced} -> synced
        {:error, :enoent} -> :binary.copy(<<0>>, stat.size)
      end

    File.write!(path, content)
  end
end
