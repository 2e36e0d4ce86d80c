/* Who runs when: threads of a program until each has stopped, then what they wait for; programs one after another. */

/* ldmatrix and stmatrix: up to four matrices of 8 x 8 halves. Lane 8 q + r holds the address of row r of matrix q; each lane holds two
   neighbours of a row of each matrix, or of a column where it is transposed. */
static void move_matrices(Launch *launch, Thread *warp) {
  for (u32 q = 0; q < warp->lane; q++)
    for (int i = 0; i < 32; i++)
      for (int half = 0; half < 2; half++) {
        Thread *thread = &warp[i];
        int line = i >> 2, pair = 2 * (i & 3) + half, row = thread->segment ? pair : line, column = thread->segment ? line : pair;
        u64 start = warp[8 * q + row].given, address = start + 2 * column;
        int kind = thread->operation == STORE_MATRIX ? STORE : LOAD;
        if (start % 16) { report(launch, MISALIGNED, thread->line, thread->source_line, thread->index, start, 16, 0); return; }
        const void *stored = kind == STORE ? (char *)&thread->matrix[q] + 2 * half : 0;
        if (!may_access_shared(launch, address, 2, kind, thread->index, thread->warp_time, stored, thread->line, thread->source_line)) return;
        if (stored) memcpy(launch->shared + address, stored, 2);
        else memcpy((char *)&thread->matrix[q] + 2 * half, launch->shared + address, 2); } }

static void run_warp(Launch *launch, Thread *warp, int count) {
  u32 waiting = 0, votes = 0, result[32]; u8 in_range[32];
  for (int i = 0; i < count; i++) if (warp[i].state == AT_WARP) { waiting |= 1u << i; if (warp[i].given) votes |= 1u << i; }
  if (waiting == 0xffffffffu && warp->operation >= LOAD_MATRIX) move_matrices(launch, warp);
  for (int i = 0; i < count; i++) {
    Thread *thread = &warp[i]; int operation = thread->operation;
    if (thread->state != AT_WARP) continue;
    result[i] = 0; in_range[i] = 1;
    if (operation >= SHUFFLE_BFLY && operation <= SHUFFLE_DOWN)
      result[i] = warp[shuffle_source(operation, i, thread->lane, thread->segment, &in_range[i]) & 31].given;
    else if (operation == VOTE_BALLOT) result[i] = votes;
    else if (operation == VOTE_ALL) result[i] = votes == waiting;
    else if (operation == VOTE_ANY) result[i] = votes != 0;
    else if (operation >= REDUCE_ADD && operation <= REDUCE_MAX_FLOAT) {
      int first = 1;
      for (int j = 0; j < count; j++) if ((waiting >> j) & 1) { result[i] = first ? warp[j].given : reduced(operation, result[i], warp[j].given); first = 0; } }
  }
  for (int i = 0; i < count; i++) if (warp[i].state == AT_WARP) {
    warp[i].result = result[i]; warp[i].in_range = in_range[i]; warp[i].state = READY; warp[i].warp_time++; } }

/* The k-th of `count` in the launch's order: forward, reversed, or by steps that have no divisor in common with the count. */
static u64 in_order(int order, u64 k, u64 count) {
  if (order == 0 || count < 3) return order == 1 ? count - 1 - k : k;
  if (order == 1) return count - 1 - k;
  for (u64 step = count / 2 + 1;; step++) {
    u64 a = step, b = count;
    while (b) { u64 rest = a % b; a = b; b = rest; }
    if (a == 1) return k * step % count; } }

static void stuck(Launch *launch, int thread) { report(launch, DEADLOCK, 0, 0, thread, 0, 0, 0); launch->failed = 1; }

/* Let the warps go on whose threads all wait for each other; return whether one did. */
static int run_warps(Launch *launch, Thread *threads) {
  int progress = 0;
  for (int first = 0; first < THREADS; first += 32) {
    int count = THREADS - first < 32 ? THREADS - first : 32, waiting = 0, others = 0, place = -1;
    for (int i = first; i < first + count; i++) {
      if (threads[i].state == AT_WARP) {
        if (place >= 0 && place != threads[i].resume) { stuck(launch, i); return 0; }
        place = threads[i].resume; waiting++;
      } else others += threads[i].state != DONE; }
    if (waiting && !others) { run_warp(launch, threads + first, count); progress = 1; } }
  return progress; }

static void run_program(Launch *launch, Thread *threads) {
  programs_run++; launch->block_time++; launch->program_start = launch->block_time;
  memset(launch->shared, 0xAB, launch->shared_size);
  if (launch->races) memset(launch->shared_shadow, 0, launch->shared_size * sizeof(Shadow));
  memset(threads, 0, sizeof(Thread) * THREADS);
  for (int i = 0; i < THREADS; i++) {
    threads[i].index = i; threads[i].state = READY;
    threads[i].place[0] = i % SIZE_X; threads[i].place[1] = i / SIZE_X % SIZE_Y; threads[i].place[2] = i / (SIZE_X * SIZE_Y); }
  for (;;) {
    int progress = 0, living = 0, waiting = 0;
    for (int k = 0; k < THREADS; k++) {
      Thread *thread = &threads[in_order(launch->order, k, THREADS)];
      if (thread->state != READY) continue;
      thread->state = run(launch, thread); progress = 1;
      if (launch->failed) return; }
    progress |= run_warps(launch, threads);
    if (launch->failed) return;
    for (int i = 0; i < THREADS; i++) { living += threads[i].state != DONE; waiting += threads[i].state == AT_BARRIER; }
    if (!living) return;
    if (waiting == living) {
      for (int i = 0; i < THREADS; i++) if (threads[i].state == AT_BARRIER) { threads[i].state = READY; threads[i].warp_time++; }
      launch->block_time++; progress = 1; }
    if (!progress) { stuck(launch, 0); return; } } }

typedef struct { s32 races, order, errors; u32 grid[3]; u64 shared_size, seed, allocation_count; } Options;

int launch(const u64 *parameters, const Options *options, const u64 *ranges, Fault *faults, u64 *fault_total, Counts *counts) {
  Launch *launch = calloc(1, sizeof(Launch)); Thread *threads = malloc(sizeof(Thread) * THREADS);
  launch->parameters = parameters; launch->races = options->races; launch->order = options->order; launch->errors = options->errors;
  launch->random = options->seed * 2654435761u + 88172645463325252ull; memcpy(launch->grid, options->grid, 12);
  launch->allocation_count = (int)options->allocation_count; launch->allocations = calloc(options->allocation_count + 1, sizeof(Allocation));
  for (int i = 0; i < launch->allocation_count; i++) {
    Allocation *each = &launch->allocations[i];
    each->start = ranges[2 * i]; each->end = ranges[2 * i + 1];
    if (launch->races) each->shadow = calloc(each->end - each->start + 1, sizeof(Shadow)); }
  launch->shared_size = options->shared_size; launch->shared = malloc(options->shared_size + 1);
  if (launch->races) launch->shared_shadow = calloc(options->shared_size + 1, sizeof(Shadow));
  u64 x = options->grid[0], y = options->grid[1], count = x * y * options->grid[2];
  for (u64 k = 0; k < count && !launch->failed; k++) {
    u64 program = in_order(launch->order, k, count);
    launch->program = program;
    launch->program_at[0] = program % x; launch->program_at[1] = program / x % y; launch->program_at[2] = program / (x * y);
    run_program(launch, threads); }
  int found = launch->fault_count;
  memcpy(faults, launch->faults, sizeof(Fault) * found); *fault_total = launch->fault_total; *counts = launch->counts;
  for (int i = 0; i < launch->allocation_count; i++) free(launch->allocations[i].shadow);
  free(launch->allocations); free(launch->shared); free(launch->shared_shadow); free(launch); free(threads);
  return found; }
