import pytest

from tests.serving.page.acts import send, waits_for

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
stubs = pytest.importorskip("tests.serving.page.stub", reason="fastapi is not installed")


def place(page):
    now = page.locator("#now")
    return float(now.get_attribute("cx")), float(now.get_attribute("cy"))


def test_a_cloud_has_no_policy_and_is_not_asked_for_one(visit, stub, watch):
    page = visit()
    expect(page.locator("#role")).to_have_text("cloud")
    expect(page.locator("#link")).to_have_text("connected")
    expect(page.locator("#policy")).to_be_hidden()
    expect(page.locator("#share-card")).to_be_hidden()
    assert not any(url.endswith("/v1/policy") for url in watch.urls)


def test_an_edge_without_a_policy_hides_it(visit, stub, watch):
    watch.expected = ("404",)
    stub.role = "edge"
    page = visit()
    expect(page.locator("#role")).to_have_text("edge")
    expect(page.locator("#link")).to_have_text("connected")
    expect(page.locator("#policy")).to_be_hidden()


def test_a_drift_alarm_is_shown_and_said(visit, stub):
    drift = {"expected": 0.1, "bound": 0.12, "rate": 0.08, "requests": 200, "evidence": 0.0, "alarms": 0}
    stub.be_an_edge(drift={**drift, "alarmed": False})
    page = visit()
    expect(page.locator("#drift")).to_have_text(
        "The cloud corrected 8.0 % of the last 200 requests; expected are 10.0 %."
    )
    expect(page.locator("#drift")).not_to_have_class("small fault")
    stub.be_an_edge(drift={**drift, "rate": 0.3, "alarms": 1, "alarmed": True})
    page = visit()
    expect(page.locator("#drift")).to_contain_text("run shadowtune calibrate again")
    expect(page.locator("#drift")).to_have_class("small fault")


def test_the_reliability_of_the_confidence_is_drawn(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#curve")).to_be_visible()
    expect(page.locator("#reliability")).to_be_hidden()
    bins = [{"confidence": 0.25, "accuracy": 0.1, "count": 5}, {"confidence": 0.85, "accuracy": 0.9, "count": 80}]
    stub.be_an_edge(reliability=bins)
    page = visit()
    points = page.locator("#reliability circle")
    expect(points).to_have_count(2)
    low, high = ({name: float(points.nth(n).get_attribute(name)) for name in ("cx", "cy", "r")} for n in (0, 1))
    assert low["cx"] < high["cx"] and low["cy"] > high["cy"] and low["r"] < high["r"]
    assert "85 % sure, 90 % right" in page.locator("#reliability svg").get_attribute("aria-label")


def test_the_curve_marks_the_threshold_and_says_what_it_promises(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#threshold")).to_have_text("0.700")
    expect(page.locator("#promise")).to_have_text(
        "At 0.700, 96.0 % of the answers should be right, with 25 % deferred and a cost of 5 cloud tokens a request."
    )
    line = page.locator("#curve path.curve").get_attribute("d")
    places = [tuple(map(float, pair.split())) for pair in line[1:].split("L")]
    assert len(places) == len(stubs.CURVE)
    assert place(page) == pytest.approx(places[2], abs=0.1)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[0][1] > places[-1][1], "more accuracy stands higher"
    assert page.locator("#curve line.chance").count() == 1
    assert page.locator("#curve").inner_text().count("by chance") == 1


def test_the_slider_sends_the_threshold_and_the_point_moves(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#promise")).to_contain_text("96.0 %")
    before = place(page)
    page.locator("#slider").press("ArrowRight")
    expect(page.locator("#threshold")).to_have_text("0.900")
    expect(page.locator("#promise")).to_contain_text("97.0 %")
    assert waits_for(page, lambda: stub.puts == [0.9])
    after = place(page)
    assert after[0] > before[0]
    assert after[1] < before[1]
    expect(page.locator("#slider")).to_have_attribute("aria-valuetext", page.locator("#promise").inner_text())
    page.reload()
    expect(page.locator("#threshold")).to_have_text("0.900")


def test_sliding_on_while_the_server_is_slow_ends_on_the_last_threshold_there_too(visit, stub):
    stub.be_an_edge()
    stub.slow_put = True
    page = visit()
    expect(page.locator("#threshold")).to_have_text("0.700")
    for key in ("ArrowRight", "End", "ArrowLeft", "Home"):
        page.locator("#slider").press(key)
    expect(page.locator("#threshold")).to_have_text("0.000")
    assert waits_for(page, lambda: stub.puts == [0.9])
    page.wait_for_timeout(200)
    stub.gate.set()
    assert waits_for(page, lambda: stub.puts[1:] == [0.0] and stub.policy["threshold"] == 0.0), stub.puts


def test_a_click_on_the_curve_takes_the_nearest_point(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#now")).to_be_visible()
    box = page.locator("#curve svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 12, box["y"] + 20)
    expect(page.locator("#threshold")).to_have_text("1.000")
    assert waits_for(page, lambda: stub.puts == [1.0])


def test_a_threshold_that_was_refused_goes_back(visit, stub, watch):
    watch.expected = ("Failed to load resource",)
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#threshold")).to_have_text("0.700")
    stub.refuse["/v1/policy"] = stubs.refusal(400, "threshold is 0.9; not today")
    page.locator("#slider").press("ArrowRight")
    expect(page.locator("#policy-fault")).to_have_text("The threshold was not changed. threshold is 0.9; not today")
    expect(page.locator("#threshold")).to_have_text("0.700")
    stub.refuse.clear()
    page.locator("#slider").press("ArrowRight")
    expect(page.locator("#threshold")).to_have_text("0.900")
    expect(page.locator("#policy-fault")).to_have_text("")


@pytest.mark.parametrize(
    ("threshold", "promised"), [(0.6, "96.0 %"), (0.9000001, "97.5 %"), (7, "97.5 %"), (-1, "90.0 %")]
)
def test_between_two_points_the_next_one_holds(visit, stub, threshold, promised):
    stub.be_an_edge(threshold=threshold)
    page = visit()
    expect(page.locator("#promise")).to_contain_text(promised)


def test_without_a_measured_curve_the_slider_works_and_the_page_says_how_to_measure(visit, stub):
    stub.be_an_edge(curve=[], threshold=0.5)
    page = visit()
    expect(page.locator("#promise")).to_contain_text("shadowtune calibrate")
    expect(page.locator("#curve")).to_be_hidden()
    page.locator("#slider").press("ArrowRight")
    expect(page.locator("#threshold")).to_have_text("0.510")
    assert waits_for(page, lambda: stub.puts == [0.51])


def test_points_that_make_no_sense_are_left_out(visit, stub):
    broken = [
        {"threshold": None, "accuracy": 1, "deferral_rate": 1, "cost": 1},
        None,
        {"threshold": "0.3"},
        stubs.CURVE[0],
    ]
    stub.be_an_edge(curve=[*broken, *stubs.CURVE])
    page = visit()
    expect(page.locator("#promise")).to_contain_text("96.0 %")
    expect(page.locator("#slider")).to_have_attribute("max", str(len(stubs.CURVE) - 1))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("always-edge", "The edge answers everything."),
        ("always-cloud", "The cloud answers everything"),
        ("tag", "defers what its model marks"),
        ("verify", "The edge drafts every answer"),
        ("new", "The policy is new."),
    ],
)
def test_a_policy_without_a_threshold_says_what_it_does(visit, stub, kind, told):
    stub.be_an_edge(kind=kind, threshold=None, signal=None, curve=[])
    page = visit()
    expect(page.locator("#rule")).to_contain_text(told)
    expect(page.locator("#slider")).to_be_hidden()
    expect(page.locator("#curve")).to_be_hidden()


def test_requests_appear_in_both_plots_by_their_side(visit, stub):
    stub.be_an_edge()
    stub.asked("edge", 0.08, 6)
    stub.asked("cloud", 1.5, 3)
    stub.asked("fallback", 2.5, 1)
    page = visit()
    for side, number in (("edge", 6), ("cloud", 3), ("fallback", 1)):
        expect(page.locator(f"#latency svg > .{side}")).to_have_count(number)
    expect(page.locator("#medians")).to_have_text("medianedge 80 mscloud 1.5 sfallback 2.5 s")
    low = page.locator("#latency svg > .edge").first.bounding_box()["y"]
    assert page.locator("#latency svg > .cloud").first.bounding_box()["y"] < low, "slower stands higher"
    edge, cloud = (page.locator(f"#latency svg > .{side}").first for side in ("edge", "cloud"))
    colours = [one.evaluate("node => getComputedStyle(node).fill") for one in (edge, cloud)]
    assert colours[0] != colours[1]
    expect(page.locator("#share")).to_have_text("30 %")
    expect(page.locator("#share-words")).to_contain_text("promised 25 %")
    expect(page.locator("#share-words")).to_contain_text("1 more would have gone")
    assert page.locator("#shares path.share").count() == 1


def test_what_comes_later_appears_by_itself(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator(".empty").first).to_contain_text("Send a message")
    stub.asked("cloud", 0.4, 2)
    expect(page.locator("#latency svg > .cloud")).to_have_count(2)
    expect(page.locator(".empty").first).to_be_hidden()
    stub.recent.clear()
    expect(page.locator(".empty").first).to_be_visible()
    expect(page.locator("#latency svg")).to_have_count(0)


def test_two_hundred_requests_at_most_and_odd_ones_are_left_out(visit, stub):
    stub.be_an_edge()
    stub.asked("edge", 0.1, 150)
    stub.asked("cloud", 0.0, 50)
    stub.recent[3]["seconds"] = None
    stub.recent[4]["time"] = "yesterday"
    page = visit()
    expect(page.locator("#latency svg > .edge")).to_have_count(149)
    expect(page.locator("#latency svg > .cloud")).to_have_count(50)


@pytest.mark.parametrize(
    ("threshold", "shown"), [(0.5, "0.500"), (0.99987, "0.999870"), (0.985, "0.9850"), (1, "1.000")]
)
def test_a_threshold_near_one_shows_the_digits_that_matter(visit, stub, threshold, shown):
    stub.be_an_edge(threshold=threshold)
    expect(visit().locator("#threshold")).to_have_text(shown)


def test_a_threshold_moved_by_somebody_else_is_noticed(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#threshold")).to_have_text("0.700")
    stub.policy["threshold"] = 0.9
    page.clock.install()
    for _ in range(16):
        with page.expect_response("**/v1/recent"):
            page.locator("#words").fill("x")
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(20)
    expect(page.locator("#threshold")).to_have_text("0.900")


def test_after_an_answer_the_plots_are_looked_at_at_once(visit, stub, watch):
    page = visit()
    expect(page.locator("#link")).to_have_text("connected")
    page.clock.install()
    with page.expect_request("**/v1/recent"):
        send(page, "hello")
