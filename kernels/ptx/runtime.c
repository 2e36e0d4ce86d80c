/* What translated instructions call: numbers, bits, and the checks of every access to memory. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef unsigned __int128 u128;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64; typedef __int128 s128;

/* --- floating point: bits to numbers and back; every NaN comes out as NVIDIA's units have it --------------------------------- */

static inline float from_f32(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double from_f64(u64 bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline float from_f16(u16 bits) { _Float16 x; memcpy(&x, &bits, 2); return (float)x; }
static inline float from_bf16(u16 bits) { return from_f32((u32)bits << 16); }

static inline u32 to_f32(float x) { u32 bits; if (isnan(x)) return 0x7fffffffu; memcpy(&bits, &x, 4); return bits; }
static inline u64 to_f64(double x) { u64 bits; memcpy(&bits, &x, 8); return bits; }
static inline u16 to_f16(double x) { _Float16 h = (_Float16)x; u16 bits; if (isnan(x)) return 0x7fff; memcpy(&bits, &h, 2); return bits; }

/* The float of `x` with its last bit set where it is not exact: rounded again to fewer bits it gives what `x` itself would. */
static inline float round_to_odd(double x) {
  float near = (float)x; u32 bits;
  if (isnan(x) || (double)near == x) return near;
  memcpy(&bits, &near, 4);
  if (fabs((double)near) > fabs(x)) bits--;   /* towards zero */
  bits |= 1; memcpy(&near, &bits, 4); return near;
}
static inline u16 to_bf16(double x) {
  u32 bits; float f = round_to_odd(x);
  if (isnan(x)) return 0x7fff;
  memcpy(&bits, &f, 4);
  return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline u16 to_bf16_truncated(double x) { u32 bits = to_f32(round_to_odd(x)); return isnan(x) ? 0x7fff : (u16)(bits >> 16); }

static inline float flush(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0.0f, x) : x; }
static inline double minimum(double a, double b) {
  if (isnan(a)) return b; if (isnan(b)) return a; if (a == b) return signbit(a) ? a : b; return a < b ? a : b; }
static inline double maximum(double a, double b) {
  if (isnan(a)) return b; if (isnan(b)) return a; if (a == b) return signbit(a) ? b : a; return a > b ? a : b; }
static inline double minimum_or_nan(double a, double b) { return isnan(a) || isnan(b) ? NAN : minimum(a, b); }
static inline double maximum_or_nan(double a, double b) { return isnan(a) || isnan(b) ? NAN : maximum(a, b); }

/* A whole number to an integer of `bits` bits; what does not fit becomes the nearest that does, and NaN zero. */
static inline u64 to_signed(double x, int bits) {
  double limit = ldexp(1.0, bits - 1); u64 least = (u64)-1 << (bits - 1);
  if (isnan(x)) return 0; if (x < -limit) return least; if (x >= limit) return ~least; return (u64)(s64)x; }
static inline u64 to_unsigned(double x, int bits) {
  if (isnan(x) || x < 0) return 0; if (x >= ldexp(1.0, bits)) return bits == 64 ? ~0ull : (1ull << bits) - 1; return (u64)x; }

/* --- bits -------------------------------------------------------------------------------------------------------------------- */

static inline u32 three_way(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int row = 0; row < 8; row++)
    if ((table >> row) & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result; }
static inline u32 permute(u32 a, u32 b, u32 selectors) {
  u64 bytes = ((u64)b << 32) | a; u32 result = 0;
  for (int place = 0; place < 4; place++) {
    u32 selector = (selectors >> (4 * place)) & 15, byte = (bytes >> (8 * (selector & 7))) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;   /* the byte's sign, repeated */
    result |= byte << (8 * place); }
  return result; }
static inline u64 low_bits(u32 length) { return length >= 64 ? ~0ull : (1ull << length) - 1; }
static inline u64 extract_bits(u64 x, u32 at, u32 length, int bits, int is_signed) {
  at &= 255; length &= 255;
  if (!length) return 0;
  u32 last = at + length - 1; if (last > (u32)bits - 1) last = bits - 1;
  u64 field = at >= (u32)bits ? 0 : (x >> at) & low_bits(last - at + 1);
  if (!is_signed || !((x >> last) & 1)) return field;
  return field | ~(at >= (u32)bits ? 0 : low_bits(last - at + 1)); }
static inline u64 insert_bits(u64 field, u64 x, u32 at, u32 length, int bits) {
  at &= 255; length &= 255;
  u64 mask = at >= (u32)bits ? 0 : low_bits(length) << at;
  return (x & ~mask) | (at >= (u32)bits ? 0 : (field << at) & mask); }
static inline u64 reverse_bits(u64 x, int bits) { u64 result = 0; for (int i = 0; i < bits; i++) result |= ((x >> i) & 1) << (bits - 1 - i); return result; }

/* --- the launch -------------------------------------------------------------------------------------------------------------- */

enum { DONE = 0, AT_BARRIER = 1, AT_WARP = 2, READY = 3 };
enum { LOAD, STORE, ATOMIC };
enum { OUT_OF_BOUNDS = 1, MISALIGNED, READ_RACE, WRITE_RACE, DEADLOCK, TRAP };
enum { MOST_FAULTS = 64 };

/* Who has touched a byte: one thread, or several of a warp, a program or more than one, and when the last of them did. */
enum { NOBODY, ONE_THREAD, ONE_WARP, ONE_PROGRAM, SEVERAL_PROGRAMS };
typedef struct { u32 thread, block_time, warp_time; u8 scope, is_atomic; } Touch;
typedef struct { Touch write, read; } Shadow;
typedef struct { u64 start, end; Shadow *shadow; } Allocation;
typedef struct { s32 kind, line, source_line, thread; u64 program, address; s32 size, other; } Fault;
typedef struct { u64 loads, stores, bytes_loaded, bytes_stored, shared_bytes; } Counts;
typedef struct Thread Thread;

typedef struct {
  const u64 *parameters; u32 grid[3], program_at[3]; u64 program;
  Allocation *allocations; int allocation_count, last_allocation;
  char *shared; u64 shared_size; Shadow *shared_shadow;
  int races, order, errors, failed; u64 random;
  /* Times count barriers over the whole launch, so that a time tells programs apart, too. */
  u32 block_time, program_start;
  Fault faults[MOST_FAULTS]; int fault_count; u64 fault_total; Counts counts;
} Launch;

#define STATE_OF_A_THREAD \
  u32 place[3], index, warp_time; int resume, state, operation; \
  u32 given, lane, segment, result, matrix[4]; u8 in_range; int line, source_line;

/* An instruction that touches memory; what it touched last, so that an address common to all threads counts once a program. */
typedef struct { u64 program, address; } Site;
static u64 programs_run;

static void report(Launch *launch, int kind, int line, int source_line, u32 thread, u64 address, int size, int other) {
  launch->fault_total++;
  for (int i = 0; i < launch->fault_count; i++)   /* one of each kind for each line */
    if (launch->faults[i].kind == kind && launch->faults[i].line == line) return;
  if (launch->fault_count < MOST_FAULTS)
    launch->faults[launch->fault_count++] = (Fault){kind, line, source_line, (s32)thread, launch->program, address, size, other}; }

/* What an approximate instruction gives: the correctly rounded bits, or others within the documented error. */
static inline u32 approximate(Launch *launch, u32 bits, int ulps) {
  if (!launch->errors || !isfinite(from_f32(bits)) || from_f32(bits) == 0.0f) return bits;
  launch->random ^= launch->random << 13; launch->random ^= launch->random >> 7; launch->random ^= launch->random << 17;
  int distance = launch->errors == 1 ? (int)(launch->random % (2 * ulps + 1)) - ulps : launch->errors == 2 ? ulps : -ulps;
  return bits + distance; }

static Allocation *allocation_of(Launch *launch, u64 address, int size) {
  int low = 0, high = launch->allocation_count - 1;
  Allocation *found = &launch->allocations[launch->last_allocation];
  if (launch->allocation_count && address >= found->start && address + size <= found->end) return found;
  while (low <= high) {
    int middle = (low + high) / 2;
    found = &launch->allocations[middle];
    if (address < found->start) high = middle - 1;
    else if (address >= found->end) low = middle + 1;
    else { launch->last_allocation = middle; return address + size <= found->end ? found : 0; }
  }
  return 0; }

/* Whether all who touched are surely done before thread `me` goes on: itself, or threads beyond a barrier that both passed. */
static inline int is_before(Launch *launch, const Touch *touch, u32 me, u32 warp_time) {
  if (touch->scope == NOBODY || (touch->scope == ONE_THREAD && touch->thread == me)) return 1;
  if (touch->scope == SEVERAL_PROGRAMS || touch->block_time < launch->program_start) return 0;
  if (touch->block_time != launch->block_time) return 1;
  return touch->scope <= ONE_WARP && touch->thread / 32 == me / 32 && touch->warp_time != warp_time; }

static inline void add_touch(Launch *launch, Touch *touch, u32 me, u32 warp_time, int is_atomic) {
  u8 scope = ONE_THREAD;
  if (!is_before(launch, touch, me, warp_time)) {
    scope = touch->block_time < launch->program_start ? SEVERAL_PROGRAMS : touch->thread / 32 == me / 32 ? ONE_WARP : ONE_PROGRAM;
    if (touch->scope > scope) scope = touch->scope; }
  *touch = (Touch){me, launch->block_time, warp_time, scope, (u8)is_atomic}; }

static void follow(Launch *launch, Shadow *shadow, u64 address, int size, int kind, u32 me, u32 warp_time, int line, int source_line) {
  for (int i = 0; i < size; i++) {
    Touch *write = &shadow[i].write, *read = &shadow[i].read;
    int both_atomic = kind == ATOMIC && write->is_atomic;
    if (!both_atomic && !is_before(launch, write, me, warp_time))
      report(launch, READ_RACE, line, source_line, me, address, size, (int)write->thread);
    if (kind == LOAD) { add_touch(launch, read, me, warp_time, 0); continue; }
    if (!is_before(launch, read, me, warp_time)) report(launch, WRITE_RACE, line, source_line, me, address, size, (int)read->thread);
    read->scope = NOBODY;   /* whoever comes after this write comes after those reads */
    *write = (Touch){me, launch->block_time, warp_time, ONE_THREAD, kind == ATOMIC}; } }

/* --- what the threads of a warp can do together ------------------------------------------------------------------------------ */

enum { WAIT, SHUFFLE_BFLY, SHUFFLE_IDX, SHUFFLE_UP, SHUFFLE_DOWN, VOTE_BALLOT, VOTE_ALL, VOTE_ANY, REDUCE_ADD, REDUCE_AND, REDUCE_OR,
       REDUCE_XOR, REDUCE_MIN_UNSIGNED, REDUCE_MAX_UNSIGNED, REDUCE_MIN_SIGNED, REDUCE_MAX_SIGNED, REDUCE_MIN_FLOAT, REDUCE_MAX_FLOAT,
       LOAD_MATRIX, STORE_MATRIX };

static u32 reduced(int operation, u32 a, u32 b) {
  switch (operation) {
    case REDUCE_ADD: return a + b;
    case REDUCE_AND: return a & b;
    case REDUCE_OR: return a | b;
    case REDUCE_XOR: return a ^ b;
    case REDUCE_MIN_UNSIGNED: return a < b ? a : b;
    case REDUCE_MAX_UNSIGNED: return a > b ? a : b;
    case REDUCE_MIN_SIGNED: return (s32)a < (s32)b ? a : b;
    case REDUCE_MAX_SIGNED: return (s32)a > (s32)b ? a : b;
    case REDUCE_MIN_FLOAT: return to_f32(minimum(from_f32(a), from_f32(b)));
    default: return to_f32(maximum(from_f32(a), from_f32(b))); } }

/* Where lane `lane` reads from in a shuffle, as the PTX manual has it, and whether that lies in its segment. */
static int shuffle_source(int operation, int lane, u32 distance, u32 clamp, u8 *in_range) {
  int limit = clamp & 31, segment = (clamp >> 8) & 31, from = lane, d = distance & 31;
  int last = (lane & segment) | (limit & ~segment), first = lane & segment;
  switch (operation) {
    case SHUFFLE_BFLY: from = lane ^ d; *in_range = from <= last; break;
    case SHUFFLE_IDX: from = first | (d & ~segment); *in_range = from <= last; break;
    case SHUFFLE_UP: from = lane - d; *in_range = from >= last; break;
    default: from = lane + d; *in_range = from <= last; break; }
  return *in_range ? from : lane; }

static inline int may_access_global(Launch *launch, u64 address, int size, int kind, u32 thread, u32 warp_time, Site *site, int line,
                                    int source_line) {
  if (address % size) { report(launch, MISALIGNED, line, source_line, thread, address, size, 0); return 0; }
  Allocation *allocation = allocation_of(launch, address, size);
  if (!allocation) { report(launch, OUT_OF_BOUNDS, line, source_line, thread, address, size, 0); return 0; }
  if (site->program != programs_run || site->address != address || kind == ATOMIC) {
    site->program = programs_run; site->address = address;
    if (kind != STORE) { launch->counts.loads++; launch->counts.bytes_loaded += size; }
    if (kind != LOAD) { launch->counts.stores++; launch->counts.bytes_stored += size; } }
  if (launch->races)
    follow(launch, allocation->shadow + (address - allocation->start), address, size, kind, thread, warp_time, line, source_line);
  return 1; }

static inline int may_access_shared(Launch *launch, u64 address, int size, int kind, u32 thread, u32 warp_time, const void *stored,
                                    int line, int source_line) {
  if (address % size) { report(launch, MISALIGNED, line, source_line, thread, address, size, 0); return 0; }
  if (address + size > launch->shared_size) { report(launch, OUT_OF_BOUNDS, line, source_line, thread, address, size, 0); return 0; }
  launch->counts.shared_bytes += size;
  /* Triton has threads that hold copies of one value all store it: equal bytes over equal bytes harm nobody. */
  if (launch->races && stored && !memcmp(stored, launch->shared + address, size)) {
    int concurrent = 0;
    for (int i = 0; i < size; i++) concurrent |= !is_before(launch, &launch->shared_shadow[address + i].write, thread, warp_time);
    if (concurrent) return 1; }
  if (launch->races) follow(launch, launch->shared_shadow + address, address, size, kind, thread, warp_time, line, source_line);
  return 1; }
