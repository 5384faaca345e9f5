def frontier_png(t):
    return b""
