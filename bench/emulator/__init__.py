"""Executes the PTX that triton compiles, on the CPU, and reports what a GPU would not: see ``python -m bench.emulate``.

    with emulated(89) as session:                   # launch.py
        kernel[grid](x, y, n, BLOCK=128)            # CPU tensors
    print(*session.findings.faults(), sep="\\n")     # each with the PTX and the Python line that it comes from

Bottom first: ptx.py reads the text; arithmetic.py and tensor_cores.py compute; memory.py knows what may be accessed, what was
written and by whom; exchange.py has the instructions through which threads reach memory and each other; machine.py runs a grid;
unwritten.py marks empty allocations; launch.py stands in for triton's launcher; dropout.py and numbers.py compare with fp64;
cases.py lists what is run; mutants.py takes barriers out.
"""
