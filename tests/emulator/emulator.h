// How a translation unit of a kernel runs it.
#pragma once
#include <functional>

#include <machine.cuh>

enum { FINE = 0, OUT_OF_RANGE = 1, OUT_OF_SHARED = 2, WRONG_LAUNCH = 3 };

// Run a kernel's threads. ascending: the order in which the fibers of a CTA get their turns.
// Returns FINE, OUT_OF_RANGE if a thread read or wrote where nothing is, OUT_OF_SHARED if it wrote beyond ``shared`` bytes or did not end.
int launch(Dim3 grid, int threads, size_t shared, bool ascending, const std::function<void()>& body_of_thread);
