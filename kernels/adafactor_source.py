"""The text of Adafactor's Numba kernels: from the places of a tile to the loops over its elements, and the launches."""

from __future__ import annotations

from typing import Any

from fusedopt.kernels import adafactor, generate, source
from fusedopt.kernels.adafactor_loops import LOOPS

_TILES = '''

@njit(**JIT)
def words(problem, table, length):
    return carray(runtime.int64_pointer(problem[table]), length)


@njit(**JIT)
def numbers(problem, table, first, length):
    return carray(runtime.float64_pointer(problem[table] + 8 * first), length)


@njit(**JIT)
def factors(problem, table, first, length):
    return carray(runtime.{compute}_pointer(problem[table] + {compute_bytes} * first), length)


@njit(**JIT)
def tensor_of(problem, index):
    """Return the addresses of a tensor's arrays, its row of the table, and its coefficients."""
    tensors = problem[at.TENSORS]
    a = carray(runtime.int64_pointer(problem[at.ADDRESSES]), (4, tensors))
    shape = carray(runtime.int64_pointer(problem[at.TENSOR_TABLE]), (tensors, at.TENSOR_ROW))[index]
    row = words(problem, at.ROW_OF_TENSOR, tensors)[index]
    c = numbers(problem, at.COEFFICIENTS, row * at.COEFFICIENT_ROW, at.COEFFICIENT_ROW)
    return a[0, index], a[1, index], a[2, index], a[3, index], shape, c


@njit(**JIT)
def finish_matrix(problem, matrix, s, t, shape, c):
    """Put the sums of the blocks of a matrix together, in their order."""
    height, width = shape[at.HEIGHT], shape[at.WIDTH]
    first = shape[at.FIRST_ROW_SUM] + matrix * shape[at.COLUMN_BLOCKS] * height
    sums = numbers(problem, at.ROW_SUMS, first, height)
    for block in range(1, shape[at.COLUMN_BLOCKS]):
        work.add_to(sums, numbers(problem, at.ROW_SUMS, first + block * height, height))
    offset = matrix * height
    own = factors(problem, at.ROW_FACTORS, shape[at.FIRST_ROW_FACTOR] + offset, height)
    finish_rows(s + {s_bytes} * offset, sums, own, 1, height, width, c)
    first = shape[at.FIRST_COLUMN_SUM] + matrix * shape[at.ROW_BLOCKS] * width
    sums = numbers(problem, at.COLUMN_SUMS, first, width)
    for block in range(1, shape[at.ROW_BLOCKS]):
        work.add_to(sums, numbers(problem, at.COLUMN_SUMS, first + block * width, width))
    offset = matrix * width
    own = factors(problem, at.COLUMN_FACTORS, shape[at.FIRST_COLUMN_FACTOR] + offset, width)
    finish_columns(t + {t_bytes} * offset, sums, own, height, c)


@njit(**JIT)
def is_last(problem, place, parts):
    """Count a part that is finished; return whether all are."""
    return runtime.fetch_add(problem[at.FINISHED] + 8 * place, 1) + 1 == parts


@njit(**JIT)
def finish_tensor(problem, tensor, shape, c):
    first, count = shape[at.FIRST_TILE], shape[at.TILE_COUNT]
    sums = numbers(problem, at.TILE_SUMS, 2 * first, 2 * count)
    own, of_updates = 0.0, 0.0
    for tile in range(count):
        own += sums[2 * tile]
        of_updates += sums[2 * tile + 1]
    numbers(problem, at.STEP_SIZES, tensor, 1)[0] = work.step_size(own, of_updates, shape[at.SIZE], c)


@njit(**JIT)
def factors_of_tile(problem, tile, shape):
    matrices, height, width = tile[at.MATRICES], shape[at.HEIGHT], shape[at.WIDTH]
    first_row = shape[at.FIRST_ROW_FACTOR] + tile[at.MATRIX] * height + tile[at.ROW]
    first_column = shape[at.FIRST_COLUMN_FACTOR] + tile[at.MATRIX] * width + tile[at.COLUMN]
    rows = factors(problem, at.ROW_FACTORS, first_row, matrices * tile[at.ROWS])
    return rows, factors(problem, at.COLUMN_FACTORS, first_column, matrices * tile[at.COLUMNS])


@njit(**JIT)
def update_squares_of_tile(g, tile, shape, row_factors, column_factors, c):
    rows, columns, width = tile[at.ROWS], tile[at.COLUMNS], shape[at.WIDTH]
    largest = {compute}(1.0 / c[at.EPS1])
    if columns < NARROW and columns == width:
        return update_squares_of_narrow_matrices(g, row_factors, column_factors, rows, columns, largest)
    total = 0.0
    for matrix in range(tile[at.MATRICES]):
        own = column_factors[matrix * columns : (matrix + 1) * columns]
        for i in range(matrix * rows, (matrix + 1) * rows):
            total += update_squares_of_row(g + {g_bytes} * i * width, columns, row_factors[i], own, largest)
    return total


@njit(**JIT)
def sums(problem, index, own_number):
    """Return whether the tile is a whole tensor, which can be updated at once."""
    tile = carray(runtime.int64_pointer(problem[at.TILE_TABLE]), (problem[at.TILES], at.TILE))[index]
    tensor = tile[at.TENSOR]
    p, g, s, t, shape, c = tensor_of(problem, tensor)
    p, g = p + {p_bytes} * tile[at.FIRST], g + {g_bytes} * tile[at.FIRST]
    squares = numbers(problem, at.TILE_SUMS, 2 * index, 2)
    height, width, matrices = shape[at.HEIGHT], shape[at.WIDTH], tile[at.MATRICES]
    rows, columns = tile[at.ROWS], tile[at.COLUMNS]
    if tile[at.SHAPE] == at.VECTOR:
        squares[0] = work.sum_of_squares_{p}(p, columns)
        squares[1] = update_squares_of_vector(g, s + {s_bytes} * tile[at.FIRST], columns, c)
    elif tile[at.SHAPE] == at.BLOCK:
        block = tile[at.MATRIX] * shape[at.COLUMN_BLOCKS] + tile[at.COLUMN] // at.BLOCK_COLUMNS
        first = shape[at.FIRST_ROW_SUM] + block * height + tile[at.ROW]
        row_sums = numbers(problem, at.ROW_SUMS, first, rows)
        block = tile[at.MATRIX] * shape[at.ROW_BLOCKS] + tile[at.ROW] // shape[at.BLOCK_ROWS]
        first = shape[at.FIRST_COLUMN_SUM] + block * width + tile[at.COLUMN]
        squares[0] = sums_of_block(p, g, width, rows, columns, row_sums, numbers(problem, at.COLUMN_SUMS, first, columns))
        blocks = shape[at.COLUMN_BLOCKS] * shape[at.ROW_BLOCKS]
        if is_last(problem, shape[at.FIRST_FINISHED] + 1 + tile[at.MATRIX], blocks):
            finish_matrix(problem, tile[at.MATRIX], s, t, shape, c)
        return False
    else:
        scratch = problem[at.SCRATCH_LENGTH]
        row_sums = numbers(problem, at.SCRATCH, 2 * own_number * scratch, matrices * height)
        column_sums = numbers(problem, at.SCRATCH, (2 * own_number + 1) * scratch, matrices * width)
        if width < NARROW:
            squares[0] = work.sum_of_squares_{p}(p, matrices * height * width)
            sums_of_narrow_matrices(g, matrices, height, width, row_sums, column_sums)
        else:
            squares[0] = 0.0
            for i in range(matrices):
                own_rows = row_sums[i * height : (i + 1) * height]
                own_columns = column_sums[i * width : (i + 1) * width]
                offset = i * height * width
                squares[0] += sums_of_block(
                    p + {p_bytes} * offset, g + {g_bytes} * offset, width, height, width, own_rows, own_columns
                )
        row_factors, column_factors = factors_of_tile(problem, tile, shape)
        finish_rows(s + {s_bytes} * tile[at.MATRIX] * height, row_sums, row_factors, matrices, height, width, c)
        finish_columns(t + {t_bytes} * tile[at.MATRIX] * width, column_sums, column_factors, height, c)
        squares[1] = update_squares_of_tile(g, tile, shape, row_factors, column_factors, c)
    if is_last(problem, shape[at.FIRST_FINISHED], shape[at.TILE_COUNT]):
        finish_tensor(problem, tensor, shape, c)
    return tile[at.WHOLE] != 0


@njit(**JIT)
def update_sums(problem, index):
    tile = carray(runtime.int64_pointer(problem[at.TILE_TABLE]), (problem[at.TILES], at.TILE))[index]
    p, g, s, t, shape, c = tensor_of(problem, tile[at.TENSOR])
    row_factors, column_factors = factors_of_tile(problem, tile, shape)
    squares = update_squares_of_tile(g + {g_bytes} * tile[at.FIRST], tile, shape, row_factors, column_factors, c)
    numbers(problem, at.TILE_SUMS, 2 * index, 2)[1] = squares
    if is_last(problem, shape[at.FIRST_FINISHED], shape[at.TILE_COUNT]):
        finish_tensor(problem, tile[at.TENSOR], shape, c)


@njit(**JIT)
def updates(problem, index):
    tile = carray(runtime.int64_pointer(problem[at.TILE_TABLE]), (problem[at.TILES], at.TILE))[index]
    p, g, s, t, shape, c = tensor_of(problem, tile[at.TENSOR])
    p, g = p + {p_bytes} * tile[at.FIRST], g + {g_bytes} * tile[at.FIRST]
    step_size = {compute}(numbers(problem, at.STEP_SIZES, tile[at.TENSOR], 1)[0])
    decay, largest = {compute}(c[at.DECAY]), {compute}(1.0 / c[at.EPS1])
    rows, columns, width = tile[at.ROWS], tile[at.COLUMNS], shape[at.WIDTH]
    if tile[at.SHAPE] == at.VECTOR:
        update_vector(p, g, s + {s_bytes} * tile[at.FIRST], columns, c, step_size)
        return
    row_factors, column_factors = factors_of_tile(problem, tile, shape)
    if columns < NARROW and columns == width:
        update_narrow_matrices(p, g, row_factors, column_factors, rows, columns, largest, decay, step_size)
        return
    for matrix in range(tile[at.MATRICES]):
        own = column_factors[matrix * columns : (matrix + 1) * columns]
        for i in range(matrix * rows, (matrix + 1) * rows):
            offset = i * width
            update_row(
                p + {p_bytes} * offset, g + {g_bytes} * offset, columns, row_factors[i], own, largest, decay, step_size
            )


@cfunc("void(int64)", cache=True, **JIT)
def run(launch):
    header = carray(runtime.int64_pointer(launch), (runtime.CLAIMED,))
    batch, chunks, regions = header[runtime.BATCH], header[runtime.CHUNKS], header[runtime.REGIONS]
    problem = carray(runtime.int64_pointer(header[runtime.ADDRESS_TABLE]), at.PROBLEM)
    tiles = carray(runtime.int64_pointer(header[runtime.CHUNK_TABLE]), chunks)
    phase = problem[at.PHASE]
    own = runtime.number(launch, header[runtime.NUMBER])
    # From one's own region first, then from those of others.
    for turn in range(regions):
        region = (own + turn) % regions
        claimed = launch + 8 * (runtime.CLAIMED + runtime.LINE * region)
        begin, end = chunks * region // regions, chunks * (region + 1) // regions
        while True:
            first = begin + runtime.fetch_add(claimed, batch)
            last = min(first + batch, end)
            if first >= last:
                break
            for chunk in range(first, last):
                moves = phase == at.UPDATES
                if phase == at.SUMS:
                    moves = sums(problem, tiles[chunk], own)
                elif phase == at.UPDATE_SUMS:
                    update_sums(problem, tiles[chunk])
                if moves:
                    updates(problem, tiles[chunk])
            runtime.fetch_add(launch + 8 * runtime.DONE, last - first)
    runtime.leave(launch, header[runtime.TEAM])
'''


def kernel_source(kind: adafactor.Kind) -> str:
    """Return the text of the module that holds the kernels for buckets of ``kind``."""
    # Imported here, because importing Numba takes half a second that only a step on a CPU need pay.
    from fusedopt.kernels import adafactor_runtime, adafactor_tiles, cpu_runtime

    names: dict[str, Any] = {}
    for letter, form in zip("pgst", kind.formats, strict=True):
        names |= {letter: form.name, f"{letter}_bytes": form.itemsize}
    return (LOOPS + _TILES).format(
        title=kind.name,
        runtime=source.fingerprint([cpu_runtime, adafactor_runtime, adafactor_tiles]),
        functions=generate.functions(adafactor.FUNCTIONS, "@njit(**JIT)"),
        compute=kind.compute.name,
        compute_bytes=kind.compute.itemsize,
        **names,
    )
