"""Generated C++ kernels of the CPU: `render` writes them, `build` compiles and loads them, `launch` calls them."""
