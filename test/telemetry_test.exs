defmodule VivaTensor.TelemetryTest do
  use ExUnit.Case, async: true
  doctest VivaTensor.Telemetry

  import ExUnit.CaptureLog

  alias VivaTensor.Telemetry

  @event [:viva_tensor, :telemetry_test]

  test "an id is attached once, to several events" do
    handler = fn event, measurements, metadata, to ->
      send(to, {event, measurements, metadata})
    end

    assert :ok = Telemetry.attach("several", [@event ++ [:a], @event ++ [:b]], handler, self())
    assert {:error, :already_exists} = Telemetry.attach("several", [@event], handler, self())

    Telemetry.execute(@event ++ [:a], %{bytes: 1}, %{name: "x"})
    Telemetry.execute(@event ++ [:b], %{bytes: 2}, %{})
    Telemetry.execute(@event ++ [:c], %{bytes: 3}, %{})
    assert_received {[_, _, :a], %{bytes: 1}, %{name: "x"}}
    assert_received {[_, _, :b], %{bytes: 2}, %{}}
    refute_received {[_, _, :c], _, _}

    assert :ok = Telemetry.detach("several")
    Telemetry.execute(@event ++ [:a], %{}, %{})
    refute_received {_, _, _}
  end

  test "a handler that raises is detached, the others run" do
    test = self()
    :ok = Telemetry.attach("raises", [@event], fn _, _, _, _ -> raise "no" end)
    :ok = Telemetry.attach("sends", [@event], fn _, _, _, _ -> send(test, :sent) end)

    log = capture_log(fn -> assert :ok = Telemetry.execute(@event, %{}, %{}) end)
    assert log =~ ~s(handler "raises" was detached)
    assert_received :sent

    assert capture_log(fn -> Telemetry.execute(@event, %{}, %{}) end) == ""
    assert_received :sent
    Telemetry.detach("sends")
  end
end
