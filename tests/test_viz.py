import matplotlib.pyplot as plt

from paperlib import viz


def test_style_is_readable_and_colour_blind_safe():
    with plt.rc_context():
        viz.use_style()
        assert plt.rcParams["font.size"] >= 11
        colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        assert colors[:2] == [viz.BLUE, viz.VERMILION]
