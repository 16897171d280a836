defmodule VivaTensor.Job.AdmissionTest do
  # One process admits for the whole node.
  use ExUnit.Case, async: false

  alias VivaTensor.Job.Admission
  alias VivaTensor.Native

  # The processes of earlier tests may still be on their way out.
  setup do
    idle = fn idle ->
      if Admission.in_flight() > 0 do
        Process.sleep(1)
        idle.(idle)
      end
    end

    idle.(idle)
    :ok
  end

  # Native calls would have a flag of their own; these tests make none.
  defp request(bytes, limit), do: Admission.request(bytes, limit, Native.cancel_flag())

  test "grants within the limit, in order, and as bytes come back" do
    first = request(60, 100)
    second = request(50, 100)
    third = request(10, 100)

    assert_receive {:admitted, ^first}
    # The third would fit, but it came after the second.
    refute_receive {:admitted, _}, 20
    assert Admission.in_flight() == 60

    Admission.release(first)
    assert_receive {:admitted, ^second}
    assert_receive {:admitted, ^third}
    assert Admission.in_flight() == 60
  end

  test "more than the limit runs alone" do
    small = request(1, 100)
    large = request(1_000, 100)
    assert_receive {:admitted, ^small}
    refute_receive {:admitted, ^large}, 20

    Admission.release(small)
    assert_receive {:admitted, ^large}
    next = request(1, 100)
    refute_receive {:admitted, ^next}, 20

    Admission.release(large)
    assert_receive {:admitted, ^next}
  end

  test "a request can be withdrawn" do
    first = request(100, 100)
    second = request(100, 100)
    third = request(100, 100)
    assert_receive {:admitted, ^first}
    Admission.release(second)
    Admission.release(first)
    assert_receive {:admitted, ^third}
    refute_received {:admitted, ^second}
  end

  test "what a process held comes back when it ends" do
    test = self()

    {pid, monitor} =
      spawn_monitor(fn ->
        ticket = request(100, 100)
        assert_receive {:admitted, ^ticket}
        request(100, 100)
        send(test, :holding)
        Process.sleep(:infinity)
      end)

    assert_receive :holding
    mine = request(100, 100)
    refute_receive {:admitted, ^mine}, 20

    Process.exit(pid, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^pid, :killed}
    assert_receive {:admitted, ^mine}
    assert Admission.in_flight() == 100
  end

  # A job of its own that asks for one ticket after the other and gives each back.
  defp job(name, bytes, priority \\ :normal) do
    test = self()

    spawn_link(fn ->
      for _ <- 1..50, do: Admission.request(bytes, 100, Native.cancel_flag(), priority)
      send(test, {:asked, name})
      granted(test, name)
    end)

    assert_receive {:asked, ^name}
  end

  defp granted(test, name) do
    receive do
      {:admitted, ticket} ->
        send(test, {:granted, name})
        Admission.release(ticket)
        granted(test, name)
    end
  end

  defp order(count) do
    for _ <- 1..count do
      assert_receive {:granted, name}
      name
    end
  end

  test "jobs share bytes, however many and however large their requests are" do
    hold = request(100, 100)
    assert_receive {:admitted, ^hold}
    job(:small, 25)
    job(:large, 100)
    Admission.release(hold)
    # Four small ones for each large one.
    counts = order(50) |> Enum.frequencies()
    assert_in_delta counts.small, 40, 4
  end

  test "a higher priority comes first, a job that came later is not owed the past" do
    hold = request(100, 100)
    assert_receive {:admitted, ^hold}
    job(:low, 100, :low)
    job(:normal, 100)
    job(:high, 100, :high)
    Admission.release(hold)
    assert order(100) == List.duplicate(:high, 50) ++ List.duplicate(:normal, 50)
    assert order(10) == List.duplicate(:low, 10)

    late = request(100, 100)
    later = request(100, 100)
    assert_receive {:admitted, ^late}
    Admission.release(late)
    assert_receive {:admitted, ^later}
    Admission.release(later)
  end
end
