/* The closed loop of a bank of emulated GPUs, one GPU after the other.
 *
 * The equations are those of emulators/gpu.py, power.py and thermal.py, in the same order of
 * operations, so that both give the same bits (tests/emulators/test_native.py): there they are
 * explained, here they are quick. bank.h is generated from what emulators/native.py says of the
 * profile's constants, the bank's columns and the state file.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bank.h"

#define EXPORT __attribute__((visibility("default")))

enum { IDLE = 0x1, CLOCK_LOCK = 0x2, SW_POWER_CAP = 0x4, SW_THERMAL = 0x20, HW_THERMAL = 0x40 };

static uint32_t u32(const char *row, size_t offset) {
    uint32_t value;
    memcpy(&value, row + offset, sizeof value);
    return value;
}

static uint64_t u64(const char *row, size_t offset) {
    uint64_t value;
    memcpy(&value, row + offset, sizeof value);
    return value;
}

static void put_u32(char *row, size_t offset, double value) {
    uint32_t whole = (uint32_t)value;
    memcpy(row + offset, &whole, sizeof whole);
}

static void put_u64(char *row, size_t offset, uint64_t value) {
    memcpy(row + offset, &value, sizeof value);
}

static void put_f8(char *row, size_t offset, double value) {
    memcpy(row + offset, &value, sizeof value);
}

static double least(double a, double b) { return a < b ? a : b; }
static double most(double a, double b) { return a > b ? a : b; }

/* emulators.power.power_w */
static double power_at(const struct profile *p, double clock, double busy, double tensor,
                       double hbm) {
    double slope = (1.0 - p->voltage_floor_frac) / (1.0 - p->voltage_knee_frac);
    double volts = most(p->voltage_floor_frac, 1.0 - slope * (1.0 - clock));
    double volts2 = volts * volts;
    return p->idle_w + p->busy_w * busy * clock * volts2 + p->tensor_w * tensor * volts2 +
           p->hbm_w * hbm;
}

/* What a GPU does now, and at which clock. */
struct work {
    double busy, tensor, hbm, clock;
    double bound, memory_now;
};

static struct work work_of(const struct profile *p, const struct columns *at, int64_t k) {
    struct work w = {at->busy_frac[k], at->tensor_frac[k], at->hbm_frac[k], at->clock_frac[k], 0, 0};
    w.bound = least(w.tensor / most(w.busy * p->gemm_efficiency * w.clock, 1e-9), 1.0);
    w.memory_now = least(w.clock / p->bandwidth_knee_frac, 1.0);
    return w;
}

/* emulators.power.demand_w */
static double demand_at(const struct profile *p, const struct work *w, double clock) {
    double memory_then = least(clock / p->bandwidth_knee_frac, 1.0);
    double times = w->bound * w->clock / clock + (1.0 - w->bound) * w->memory_now / memory_then;
    return power_at(p, clock, w->busy, w->tensor / times, w->hbm / times);
}

/* emulators.power.clock_for_limit */
static double clock_that_fits(const struct profile *p, const struct columns *at,
                              const struct work *w, double limit_w) {
    if (!(demand_at(p, w, 1.0) > limit_w)) {
        return 1.0;
    }
    /* Demand grows with the clock, so the levels that fit are the first ones: halve to the last. */
    int64_t last = 0, beyond = NUM_LEVELS;
    while (beyond - last > 1) {
        int64_t middle = (last + beyond) / 2;
        if (demand_at(p, w, at->levels[middle]) <= limit_w) {
            last = middle;
        } else {
            beyond = middle;
        }
    }
    int64_t upper = last + 1 < NUM_LEVELS ? last + 1 : NUM_LEVELS - 1;
    double low_w = demand_at(p, w, at->levels[last]), high_w = demand_at(p, w, at->levels[upper]);
    double part = least(most((limit_w - low_w) / most(high_w - low_w, 1e-9), 0.0), 1.0);
    return at->levels[last] + part * (at->levels[upper] - at->levels[last]);
}

static uint32_t enforced_mw(const char *measured, const char *control) {
    uint32_t asked = u32(control, CONTROL_power_limit_mw);
    uint32_t out_of_band = u32(measured, MEASURED_power_limit_oob_mw);
    return out_of_band > 0 && out_of_band < asked ? out_of_band : asked;
}

/* Power and energy of a tick from the work that was done in it. */
EXPORT void bank_draw(const struct profile *p, const struct columns *at, int64_t count,
                      const char *measured, const double *unloaded_w, double dt_s) {
    for (int64_t k = 0; k < count; k++) {
        double watts = power_at(p, at->clock_frac[k], at->busy_frac[k], at->tensor_frac[k],
                                at->hbm_frac[k]);
        if (unloaded_w) {
            watts = watts - unloaded_w[k];
        }
        if (u32(measured + k * MEASURED_SIZE, MEASURED_lost)) {
            watts = 0.0;
        }
        at->power_w[k] = watts;
        at->energy_j[k] += watts * dt_s;
    }
}

/* What follows from it: heat, the clock of the next tick, and what NVML shows. */
EXPORT void bank_settle(const struct profile *p, const struct columns *at, int64_t count,
                        char *measured_rows, const char *control_rows, const struct step *step) {
    for (int64_t k = 0; k < count; k++) {
        char *measured = measured_rows + k * MEASURED_SIZE;
        const char *control = control_rows + k * CONTROL_SIZE;
        double watts = at->power_w[k];

        /* Heat: emulators.thermal.Thermal.advance */
        double target_c = p->thermal_fast_c_per_w * at->effective_w[k];
        double fast_c = target_c + (at->fast_c[k] - target_c) * step->fast_decay;
        target_c = p->thermal_slow_c_per_w * at->effective_w[k];
        double slow_c = target_c + (at->slow_c[k] - target_c) * step->slow_decay;
        double temp_c = at->inlet_c[k] + at->offset_c[k] + fast_c + slow_c;
        at->fast_c[k] = fast_c;
        at->slow_c[k] = slow_c;
        at->temp_c[k] = temp_c;

        /* The clock that is asked for: GpuBank._asked */
        double thermal_frac = at->thermal_frac[k];
        if (temp_c >= p->temp_slowdown_c) {
            thermal_frac = thermal_frac - step->thermal_step;
        } else if (temp_c < p->temp_slowdown_c - step->cool_c) {
            thermal_frac = thermal_frac + step->thermal_step;
        }
        thermal_frac = least(most(thermal_frac, step->smallest_frac), 1.0);
        at->thermal_frac[k] = thermal_frac;
        uint32_t lock_mhz = u32(control, CONTROL_sm_clock_lock_max_mhz);
        double lock_frac = lock_mhz > 0 ? lock_mhz / p->sm_clock_max_mhz : 1.0;
        double asked_frac = least(least(lock_frac, 1.0), thermal_frac);

        /* The clock that the cap leaves: GpuBank._allowed_w and advance */
        double enforced_w = enforced_mw(measured, control) / 1000.0;
        at->enforced_w[k] = enforced_w;
        struct work work = work_of(p, at, k);
        double demand_w = demand_at(p, &work, asked_frac);
        at->demand_w[k] = demand_w;
        int capped = demand_w > enforced_w;
        double smooth_w = watts + (at->smooth_w[k] - watts) * step->control_decay;
        at->smooth_w[k] = smooth_w;
        double excess_w = most(smooth_w - enforced_w, 0.0);
        double allowed_w =
            most(enforced_w - step->payback * excess_w, step->allowed_floor_frac * enforced_w);
        double target_frac = least(asked_frac, clock_that_fits(p, at, &work, allowed_w));
        target_frac = most(floor(target_frac / step->step_frac + 1e-9) * step->step_frac,
                           step->smallest_frac);
        double share = target_frac < work.clock ? step->down_share : step->up_share;
        double moved = work.clock + (target_frac - work.clock) * share;
        moved = rint(moved / step->step_frac) * step->step_frac;
        int near = fabs(moved - target_frac) < 2 * step->step_frac;
        double clock_frac = least(most(near ? target_frac : moved, step->smallest_frac), 1.0);
        at->clock_frac[k] = clock_frac;

        /* What NVML shows: GpuBank._publish */
        int idle = work.busy <= 0.0;
        uint64_t reasons = idle ? IDLE : 0;
        if (capped) {
            reasons |= SW_POWER_CAP;
        }
        if (lock_mhz > 0 && lock_mhz < p->sm_clock_max_mhz && !idle) {
            reasons |= CLOCK_LOCK;
        }
        if (thermal_frac < 1.0) {
            reasons |= SW_THERMAL;
        }
        if (temp_c >= p->temp_shutdown_c) {
            reasons |= HW_THERMAL;
        }
        double average_w = watts;
        if (step->span_s > 0.0) {
            average_w = (at->energy_j[k] - at->then_j[k]) / step->span_s;
        }
        double lowest_mhz = p->sm_clock_idle_mhz + p->sm_clock_step_mhz;
        if (lock_mhz > 0) {
            lowest_mhz = least(lock_mhz, lowest_mhz);
        }
        double clock_mhz = idle ? p->sm_clock_idle_mhz
                                : most(clock_frac * p->sm_clock_max_mhz, lowest_mhz);
        double mem_temp_c = temp_c - fast_c + p->mem_temp_offset_c;
        put_u32(measured, MEASURED_power_instant_mw, rint(watts * 1000));
        put_u32(measured, MEASURED_power_average_mw, rint(average_w * 1000));
        put_u64(measured, MEASURED_energy_mj, (uint64_t)(at->energy_j[k] * 1000));
        put_u32(measured, MEASURED_sm_clock_mhz, rint(clock_mhz));
        put_u32(measured, MEASURED_temp_c, most(rint(temp_c), 0));
        put_u32(measured, MEASURED_mem_temp_c, most(rint(mem_temp_c), 0));
        put_u32(measured, MEASURED_gpu_util_pct, ceil(work.busy * 100));
        put_u32(measured, MEASURED_mem_util_pct, least(ceil(work.hbm * 100), 100));
        put_u64(measured, MEASURED_throttle, reasons);
        if (reasons & SW_POWER_CAP) {
            put_u64(measured, MEASURED_power_violation_ns,
                    u64(measured, MEASURED_power_violation_ns) + step->spent_ns);
        }
        if (reasons & (SW_THERMAL | HW_THERMAL)) {
            put_u64(measured, MEASURED_thermal_violation_ns,
                    u64(measured, MEASURED_thermal_violation_ns) + step->spent_ns);
        }
    }
}

/* All readings as the records of testbed.core.messages.GpuReadings: emulators.server.gpu_columns */
EXPORT void bank_read(const char *measured_rows, const char *control_rows, int64_t count,
                      char *records) {
    for (int64_t k = 0; k < count; k++) {
        const char *measured = measured_rows + k * MEASURED_SIZE;
        const char *control = control_rows + k * CONTROL_SIZE;
        char *record = records + k * READINGS_SIZE;
        memset(record, 0, READINGS_SIZE);
        put_f8(record, READINGS_energy_j, u64(measured, MEASURED_energy_mj) / 1000.0);
        if (u32(measured, MEASURED_lost)) {
            record[READINGS_lost] = 1;
            continue;
        }
        put_f8(record, READINGS_power_instant_w, u32(measured, MEASURED_power_instant_mw) / 1000.0);
        put_f8(record, READINGS_power_avg_w, u32(measured, MEASURED_power_average_mw) / 1000.0);
        put_f8(record, READINGS_power_limit_w, u32(control, CONTROL_power_limit_mw) / 1000.0);
        put_f8(record, READINGS_power_limit_enforced_w, enforced_mw(measured, control) / 1000.0);
        put_f8(record, READINGS_sm_clock_mhz, u32(measured, MEASURED_sm_clock_mhz));
        put_f8(record, READINGS_temp_c, u32(measured, MEASURED_temp_c));
        put_f8(record, READINGS_mem_temp_c, u32(measured, MEASURED_mem_temp_c));
        put_f8(record, READINGS_gpu_busy_frac, u32(measured, MEASURED_gpu_util_pct) / 100.0);
        put_u64(record, READINGS_fb_used_bytes,
                u64(measured, MEASURED_memory_used_bytes) +
                    u64(measured, MEASURED_memory_reserved_bytes));
        put_u64(record, READINGS_throttle, u64(measured, MEASURED_throttle));
    }
}

/* What engines did since the last tick, as the work of their GPUs: ServerBank._activity
 *
 * done and before have a row each for busy seconds, operations and bytes, with an entry per engine
 * and one more for GPUs without one; left and work have them per GPU.
 */
EXPORT void engines_load(const double *done, const double *before, int64_t engines,
                         const int64_t *engine_of, int64_t gpus, const double *left, double dt_s,
                         double flops_per_s, double bytes_per_s, double *work) {
    double scale[3] = {dt_s, dt_s * flops_per_s, dt_s * bytes_per_s};
    for (int64_t row = 0; row < 3; row++) {
        for (int64_t k = 0; k < gpus; k++) {
            int64_t engine = row * engines + engine_of[k];
            double since = done[engine] - before[engine];
            work[row * gpus + k] = (since + left[row * gpus + k]) / scale[row];
        }
    }
    for (int64_t k = 0; k < gpus; k++) {
        work[k] = least(work[k], 1.0);
    }
}

/* The clock of each engine, that of its slowest GPU: ServerBank._paces. Returns how many have
 * another than before, and which. */
EXPORT int64_t engines_pace(const double *clock_frac, const int64_t *engine_of, int64_t gpus,
                            double *pace, double *before, int64_t engines, int64_t *changed) {
    int64_t count = 0;
    for (int64_t engine = 0; engine < engines; engine++) {
        pace[engine] = 1.0;
    }
    for (int64_t k = 0; k < gpus; k++) {
        pace[engine_of[k]] = least(clock_frac[k], pace[engine_of[k]]);
    }
    for (int64_t engine = 0; engine + 1 < engines; engine++) { /* the last stands for none */
        if (pace[engine] != before[engine]) {
            before[engine] = pace[engine];
            changed[count++] = engine;
        }
    }
    return count;
}
