/* libnvidia-ml.so.1 for emulated GPUs: NVML's public interface on a state file.
 *
 * The file that $TESTBED_NVML_STATE names is written by an emulator (emulators/state.py has the
 * layout, from which layout.h is generated). Every call reads what it needs with pread and every
 * setter writes its field with pwrite. Nothing is mapped, so a file that is cut short under a
 * running client is a short read and an error code, not a SIGBUS; and a client that may not open
 * the file for writing is refused by the kernel before anything of ours is touched.
 *
 * A block is read between two looks at the sequence counter, which is odd while the emulator
 * writes. A writer that only lost its core is waited for. One that died in the middle is given up,
 * once for all calls: fields are aligned and written whole, so the last values still read well one
 * by one.
 *
 * Names that are not implemented here are in stubs.c and return NVML_ERROR_NOT_SUPPORTED: a missing
 * symbol costs clients more than an unsupported call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "layout.h"

#define EXPORT __attribute__((visibility("default")))
#define MAX_GPUS 64
#define WRITE_NS 500000000ULL /* far beyond any write: a busy machine takes its turn away */
#define WRITE_LOOKS 500       /* and so often, lest reader and writer were stopped together */
#define READ_LOOKS 100000     /* seconds of a writer that never pauses */
#define STALE_NS 5000000000ULL /* an emulator ticks at 10 to 100 Hz */
#define VERSIONED(type, version) ((unsigned)(sizeof(type) | ((unsigned)(version) << 24)))

struct nvmlDevice_st {
    unsigned index;
};

static struct nvmlDevice_st devices[MAX_GPUS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int users;
static int file = -1;
static int writable;
static unsigned num_gpus;

/* One GPU's two blocks, as read at one moment. */
struct gpu {
    unsigned char measured[MEASURED_SIZE];
    unsigned char control[CONTROL_SIZE];
};

static uint32_t u32(const unsigned char *block, size_t offset) {
    uint32_t value;
    memcpy(&value, block + offset, sizeof value);
    return value;
}

static uint64_t u64(const unsigned char *block, size_t offset) {
    uint64_t value;
    memcpy(&value, block + offset, sizeof value);
    return value;
}

#define M32(gpu, field) u32((gpu)->measured, MEASURED_##field)
#define M64(gpu, field) u64((gpu)->measured, MEASURED_##field)
#define C32(gpu, field) u32((gpu)->control, CONTROL_##field)

static off_t measured_at(unsigned index) {
    return (off_t)HEADER_SIZE + (off_t)index * MEASURED_SIZE;
}

static off_t control_at(unsigned index) {
    return (off_t)HEADER_SIZE + (off_t)num_gpus * MEASURED_SIZE + (off_t)index * CONTROL_SIZE;
}

static uint64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

static int read_whole(void *to, size_t size, off_t from) {
    ssize_t got;
    do
        got = pread(file, to, size, from);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t)size;
}

static nvmlReturn_t read_gpu(nvmlDevice_t device, struct gpu *gpu) {
    if (file < 0)
        return NVML_ERROR_UNINITIALIZED;
    if (device < devices || device >= devices + num_gpus)
        return NVML_ERROR_INVALID_ARGUMENT;
    static uint64_t abandoned; /* the odd count at which a writer died */
    uint64_t before, after, seen = 0, seen_ns = 0;
    for (unsigned look = 0, same = 0; look < READ_LOOKS; look++, same++) {
        if (!read_whole(&before, sizeof before, HEADER_sequence) ||
            !read_whole(gpu->measured, MEASURED_SIZE, measured_at(device->index)) ||
            !read_whole(gpu->control, CONTROL_SIZE, control_at(device->index)) ||
            !read_whole(&after, sizeof after, HEADER_sequence))
            return NVML_ERROR_UNKNOWN;
        if (before == after &&
            (before % 2 == 0 || before == __atomic_load_n(&abandoned, __ATOMIC_RELAXED)))
            return NVML_SUCCESS;
        if (look < 20)
            continue;
        if (after != seen) {
            seen = after;
            seen_ns = monotonic_ns();
            same = 0;
        } else if (same > WRITE_LOOKS && monotonic_ns() - seen_ns > WRITE_NS) {
            __atomic_store_n(&abandoned, seen, __ATOMIC_RELAXED);
        }
        /* Two lengths, so as not to fall into step with a writer. */
        nanosleep(&(struct timespec){0, look % 2 ? 20000 : 70000}, NULL);
    }
    return NVML_ERROR_TIMEOUT;
}

/* The block of a GPU that is there; what most getters begin with. */
#define READ(device, gpu)                               \
    struct gpu gpu;                                     \
    do {                                                \
        nvmlReturn_t result_ = read_gpu((device), &gpu); \
        if (result_ != NVML_SUCCESS)                    \
            return result_;                             \
        if (M32(&gpu, lost))                            \
            return NVML_ERROR_GPU_IS_LOST;              \
    } while (0)

#define NEED(pointer)                           \
    do {                                        \
        if (!(pointer))                         \
            return NVML_ERROR_INVALID_ARGUMENT; \
    } while (0)

static nvmlReturn_t set_control(nvmlDevice_t device, size_t offset, uint32_t value) {
    if (!writable)
        return NVML_ERROR_NO_PERMISSION;
    off_t at = control_at(device->index) + (off_t)offset;
    if (pwrite(file, &value, sizeof value, at) != (ssize_t)sizeof value)
        return NVML_ERROR_UNKNOWN;
    return NVML_SUCCESS;
}

static long long realtime_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (long long)now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

/* ---- library ---- */

static nvmlReturn_t open_state(void) {
    unsigned char header[HEADER_SIZE];
    struct stat info;
    const char *path = getenv("TESTBED_NVML_STATE");
    if (!path || !*path)
        return NVML_ERROR_DRIVER_NOT_LOADED;
    writable = 1;
    file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) {
        writable = 0;
        file = open(path, O_RDONLY | O_CLOEXEC);
    }
    if (file < 0)
        return NVML_ERROR_DRIVER_NOT_LOADED;
    if (!read_whole(header, sizeof header, 0) ||
        memcmp(header + HEADER_magic, LAYOUT_MAGIC, LAYOUT_MAGIC_SIZE) != 0 ||
        u32(header, HEADER_layout_version) != LAYOUT_VERSION)
        goto refuse;
    num_gpus = u32(header, HEADER_num_gpus);
    if (num_gpus < 1 || num_gpus > MAX_GPUS || fstat(file, &info) != 0 ||
        info.st_size < control_at(num_gpus))
        goto refuse;
    uint64_t heartbeat = u64(header, HEADER_heartbeat_ns), now = monotonic_ns();
    if (heartbeat > now || now - heartbeat > STALE_NS)
        goto refuse; /* nobody keeps these GPUs, or not since this boot */
    for (unsigned index = 0; index < MAX_GPUS; index++)
        devices[index].index = index;
    return NVML_SUCCESS;
refuse:
    close(file);
    file = -1;
    num_gpus = 0;
    return NVML_ERROR_DRIVER_NOT_LOADED;
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&mutex);
    nvmlReturn_t result = users ? NVML_SUCCESS : open_state();
    if (result == NVML_SUCCESS)
        users++;
    pthread_mutex_unlock(&mutex);
    return result;
}

EXPORT nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

EXPORT nvmlReturn_t nvmlShutdown(void) {
    pthread_mutex_lock(&mutex);
    nvmlReturn_t result = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users && --users == 0) {
        close(file);
        file = -1;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

EXPORT const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NO_PERMISSION: return "Insufficient Permissions";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case NVML_ERROR_TIMEOUT: return "Timeout";
    case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

static nvmlReturn_t put_text(const char *text, char *to, unsigned size) {
    NEED(to);
    if (strlen(text) + 1 > size)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(to, text);
    return NVML_SUCCESS;
}

static nvmlReturn_t system_text(const char *text, char *to, unsigned size) {
    return file < 0 ? NVML_ERROR_UNINITIALIZED : put_text(text, to, size);
}

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *to, unsigned size) {
    return system_text(LAYOUT_DRIVER, to, size);
}
EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *to, unsigned size) {
    return system_text("13." LAYOUT_DRIVER, to, size);
}
EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    NEED(version);
    *version = 13000;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
    return nvmlSystemGetCudaDriverVersion_v2(version);
}
EXPORT nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *to, unsigned size) {
    char path[64], name[256];
    if (!to || !size)
        return NVML_ERROR_INVALID_ARGUMENT;
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int process = open(path, O_RDONLY | O_CLOEXEC);
    if (process < 0)
        return NVML_ERROR_NOT_FOUND;
    ssize_t got = read(process, name, sizeof name - 1);
    close(process);
    name[got > 0 ? got : 0] = '\0';
    snprintf(to, size, "%s", name);
    return NVML_SUCCESS;
}

/* ---- finding GPUs ---- */

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    if (file < 0)
        return NVML_ERROR_UNINITIALIZED;
    NEED(count);
    *count = num_gpus;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    struct gpu gpu;
    if (file < 0)
        return NVML_ERROR_UNINITIALIZED;
    NEED(device);
    if (index >= num_gpus)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = read_gpu(&devices[index], &gpu);
    if (result != NVML_SUCCESS)
        return result;
    *device = &devices[index];
    return M32(&gpu, lost) ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

static nvmlReturn_t find(const char *text, size_t offset, size_t size, nvmlDevice_t *device) {
    struct gpu gpu;
    if (file < 0)
        return NVML_ERROR_UNINITIALIZED;
    if (!text || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned index = 0; index < num_gpus; index++) {
        nvmlReturn_t result = read_gpu(&devices[index], &gpu);
        if (result != NVML_SUCCESS)
            return result;
        if (strncasecmp((const char *)gpu.measured + offset, text, size) == 0) {
            *device = &devices[index];
            return M32(&gpu, lost) ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
        }
    }
    return NVML_ERROR_NOT_FOUND;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    return find(uuid, MEASURED_uuid, MEASURED_uuid_SIZE, device);
}
EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *id, nvmlDevice_t *device) {
    return find(id, MEASURED_pci_bus_id, MEASURED_pci_bus_id_SIZE, device);
}
EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *id, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(id, device);
}

EXPORT nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    READ(device, gpu);
    NEED(index);
    *index = device->index;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor) {
    return nvmlDeviceGetIndex(device, minor);
}
EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *to, unsigned size) {
    READ(device, gpu);
    return put_text((const char *)gpu.measured + MEASURED_name, to, size);
}
EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *to, unsigned size) {
    struct gpu gpu; /* also of a lost GPU: one must be able to say which it is */
    nvmlReturn_t result = read_gpu(device, &gpu);
    if (result != NVML_SUCCESS)
        return result;
    return put_text((const char *)gpu.measured + MEASURED_uuid, to, size);
}
EXPORT nvmlReturn_t nvmlDeviceGetBrand(nvmlDevice_t device, unsigned *brand) {
    READ(device, gpu);
    NEED(brand);
    *brand = 14; /* NVML_BRAND_NVIDIA */
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned *architecture) {
    READ(device, gpu);
    NEED(architecture);
    *architecture = M32(&gpu, architecture);
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    READ(device, gpu);
    if (!major || !minor)
        return NVML_ERROR_INVALID_ARGUMENT;
    *major = (int)M32(&gpu, cuda_major);
    *minor = (int)M32(&gpu, cuda_minor);
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    READ(device, gpu);
    NEED(pci);
    const char *id = (const char *)gpu.measured + MEASURED_pci_bus_id;
    memset(pci, 0, sizeof *pci);
    memcpy(pci->busId, id, sizeof pci->busId - 1);
    memcpy(pci->busIdLegacy, id + 4, sizeof pci->busIdLegacy - 1); /* a domain of 4 digits */
    pci->bus = device->index;
    pci->pciDeviceId = pci->pciSubSystemId = 0x10DE; /* NVIDIA; profiles know no device numbers */
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    return nvmlDeviceGetPciInfo_v3(device, pci);
}
EXPORT nvmlReturn_t nvmlDeviceGetPciInfo(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    return nvmlDeviceGetPciInfo_v3(device, pci);
}

/* Getters of one number. */
#define GETTER(name, type, expression)                                \
    EXPORT nvmlReturn_t name(nvmlDevice_t device, type *value) {      \
        READ(device, gpu);                                            \
        NEED(value);                                                  \
        *value = (type)(expression);                                  \
        return NVML_SUCCESS;                                          \
    }

/* ---- power ---- */

static unsigned enforced_mw(const struct gpu *gpu) {
    unsigned asked = C32(gpu, power_limit_mw), other = M32(gpu, power_limit_oob_mw);
    return other && other < asked ? other : asked;
}

GETTER(nvmlDeviceGetPowerUsage, unsigned, M32(&gpu, power_average_mw))
GETTER(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, M64(&gpu, energy_mj))
GETTER(nvmlDeviceGetPowerManagementMode, unsigned, 1)
GETTER(nvmlDeviceGetPowerManagementLimit, unsigned, C32(&gpu, power_limit_mw))
GETTER(nvmlDeviceGetPowerManagementDefaultLimit, unsigned, M32(&gpu, power_limit_default_mw))
GETTER(nvmlDeviceGetEnforcedPowerLimit, unsigned, enforced_mw(&gpu))
GETTER(nvmlDeviceGetPowerState, unsigned, 0)
GETTER(nvmlDeviceGetPerformanceState, unsigned, 0)

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device,
                                                                 unsigned *low, unsigned *high) {
    READ(device, gpu);
    if (!low || !high)
        return NVML_ERROR_INVALID_ARGUMENT;
    *low = M32(&gpu, power_limit_min_mw);
    *high = M32(&gpu, power_limit_max_mw);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned limit_mw) {
    READ(device, gpu);
    if (!writable)
        return NVML_ERROR_NO_PERMISSION;
    if (limit_mw < M32(&gpu, power_limit_min_mw) || limit_mw > M32(&gpu, power_limit_max_mw))
        return NVML_ERROR_INVALID_ARGUMENT;
    return set_control(device, CONTROL_power_limit_mw, limit_mw);
}
EXPORT nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(nvmlDevice_t device,
                                                         nvmlPowerValue_v2_t *value) {
    NEED(value);
    if (value->version != VERSIONED(nvmlPowerValue_v2_t, 2))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (value->powerScope != 0)
        return NVML_ERROR_NOT_SUPPORTED;
    return nvmlDeviceSetPowerManagementLimit(device, value->powerValueMw);
}

static nvmlReturn_t field_value(const struct gpu *gpu, nvmlFieldValue_t *field) {
    field->valueType = NVML_VALUE_TYPE_UNSIGNED_INT;
    switch (field->fieldId) {
    case 82: field->value.uiVal = M32(gpu, mem_temp_c); break;
    case 83:
        field->valueType = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
        field->value.ullVal = M64(gpu, energy_mj);
        break;
    case 185: field->value.uiVal = M32(gpu, power_average_mw); break;
    case 186: field->value.uiVal = M32(gpu, power_instant_mw); break;
    case 187: field->value.uiVal = M32(gpu, power_limit_min_mw); break;
    case 188: field->value.uiVal = M32(gpu, power_limit_max_mw); break;
    case 189: field->value.uiVal = M32(gpu, power_limit_default_mw); break;
    case 190: field->value.uiVal = enforced_mw(gpu); break;
    case 192: field->value.uiVal = C32(gpu, power_limit_mw); break;
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count,
                                             nvmlFieldValue_t *values) {
    READ(device, gpu);
    if (count < 0 || !values)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (int index = 0; index < count; index++) {
        values[index].timestamp = realtime_us();
        values[index].latencyUsec = 0;
        values[index].nvmlReturn = field_value(&gpu, &values[index]);
    }
    return NVML_SUCCESS;
}

/* ---- clocks ---- */

static nvmlReturn_t clock_of(const struct gpu *gpu, unsigned type, int highest, unsigned *mhz) {
    NEED(mhz);
    if (type > 3)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (type == 2)
        *mhz = M32(gpu, mem_clock_mhz);
    else
        *mhz = highest ? M32(gpu, sm_clock_max_mhz) : M32(gpu, sm_clock_mhz);
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned type, unsigned *mhz) {
    READ(device, gpu);
    return clock_of(&gpu, type, 0, mhz);
}
EXPORT nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned type, unsigned *mhz) {
    READ(device, gpu);
    return clock_of(&gpu, type, 1, mhz);
}
EXPORT nvmlReturn_t nvmlDeviceGetMaxCustomerBoostClock(nvmlDevice_t device, unsigned type,
                                                       unsigned *mhz) {
    return nvmlDeviceGetMaxClockInfo(device, type, mhz);
}
EXPORT nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, unsigned type, unsigned id,
                                       unsigned *mhz) {
    READ(device, gpu);
    return clock_of(&gpu, type, id == 3, mhz);
}

static nvmlReturn_t list_clocks(unsigned high, unsigned low, unsigned step, unsigned *count,
                                unsigned *mhz) {
    NEED(count);
    unsigned needed = step ? (high - low) / step + 1 : 1, room = *count;
    *count = needed;
    if (room < needed || !mhz)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned index = 0; index < needed; index++)
        mhz[index] = high - index * step;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned *count,
                                                       unsigned *mhz) {
    READ(device, gpu);
    unsigned only = M32(&gpu, mem_clock_mhz);
    return list_clocks(only, only, 0, count, mhz);
}
EXPORT nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t device, unsigned memory_mhz,
                                                         unsigned *count, unsigned *mhz) {
    READ(device, gpu);
    if (memory_mhz != M32(&gpu, mem_clock_mhz))
        return NVML_ERROR_NOT_FOUND;
    return list_clocks(M32(&gpu, sm_clock_max_mhz), M32(&gpu, sm_clock_min_mhz),
                       M32(&gpu, sm_clock_step_mhz), count, mhz);
}

static unsigned between(unsigned value, unsigned low, unsigned high) {
    return value < low ? low : value > high ? high : value;
}
EXPORT nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t device, unsigned low, unsigned high) {
    READ(device, gpu);
    if (!writable)
        return NVML_ERROR_NO_PERMISSION;
    if (!low || low > high)
        return NVML_ERROR_INVALID_ARGUMENT;
    unsigned least = M32(&gpu, sm_clock_min_mhz), most = M32(&gpu, sm_clock_max_mhz);
    nvmlReturn_t result =
        set_control(device, CONTROL_sm_clock_lock_min_mhz, between(low, least, most));
    if (result != NVML_SUCCESS)
        return result;
    return set_control(device, CONTROL_sm_clock_lock_max_mhz, between(high, least, most));
}
EXPORT nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t device) {
    READ(device, gpu);
    nvmlReturn_t result = set_control(device, CONTROL_sm_clock_lock_max_mhz, 0);
    return result ? result : set_control(device, CONTROL_sm_clock_lock_min_mhz, 0);
}
EXPORT nvmlReturn_t nvmlDeviceSetMemoryLockedClocks(nvmlDevice_t device, unsigned low,
                                                    unsigned high) {
    READ(device, gpu);
    if (!writable)
        return NVML_ERROR_NO_PERMISSION;
    if (!low || low > high)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = set_control(device, CONTROL_mem_clock_lock_min_mhz, low);
    return result ? result : set_control(device, CONTROL_mem_clock_lock_max_mhz, high);
}
EXPORT nvmlReturn_t nvmlDeviceResetMemoryLockedClocks(nvmlDevice_t device) {
    READ(device, gpu);
    nvmlReturn_t result = set_control(device, CONTROL_mem_clock_lock_max_mhz, 0);
    return result ? result : set_control(device, CONTROL_mem_clock_lock_min_mhz, 0);
}

GETTER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, M64(&gpu, throttle))
GETTER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, M64(&gpu, throttle))
GETTER(nvmlDeviceGetSupportedClocksEventReasons, unsigned long long, 0xFF)
GETTER(nvmlDeviceGetSupportedClocksThrottleReasons, unsigned long long, 0xFF)

EXPORT nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t device, unsigned policy,
                                                 nvmlViolationTime_t *violation) {
    READ(device, gpu);
    NEED(violation);
    violation->referenceTime = (unsigned long long)realtime_us();
    switch (policy) {
    case 0: violation->violationTime = M64(&gpu, power_violation_ns); break;
    case 1: violation->violationTime = M64(&gpu, thermal_violation_ns); break;
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
    return NVML_SUCCESS;
}

/* ---- heat ---- */

EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *c) {
    READ(device, gpu);
    if (!c || sensor != 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    *c = M32(&gpu, temp_c);
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_v1_t *value) {
    READ(device, gpu);
    NEED(value);
    if (value->version != VERSIONED(nvmlTemperature_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (value->sensorType != 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    value->temperature = (int)M32(&gpu, temp_c);
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t device,
                                                   nvmlMarginTemperature_v1_t *value) {
    READ(device, gpu);
    NEED(value);
    if (value->version != VERSIONED(nvmlMarginTemperature_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    value->marginTemperature = (int)M32(&gpu, temp_slowdown_c) - (int)M32(&gpu, temp_c);
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, unsigned threshold,
                                                      unsigned *c) {
    READ(device, gpu);
    NEED(c);
    switch (threshold) {
    case 0: *c = M32(&gpu, temp_shutdown_c); return NVML_SUCCESS;
    case 1:
    case 3: *c = M32(&gpu, temp_slowdown_c); return NVML_SUCCESS;
    default: return threshold < 8 ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_INVALID_ARGUMENT;
    }
}

/* ---- memory, load, processes ---- */

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    READ(device, gpu);
    NEED(memory);
    memory->total = M64(&gpu, memory_total_bytes);
    memory->used = M64(&gpu, memory_used_bytes) + M64(&gpu, memory_reserved_bytes);
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    READ(device, gpu);
    NEED(memory);
    if (memory->version != VERSIONED(nvmlMemory_v2_t, 2))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    memory->total = M64(&gpu, memory_total_bytes);
    memory->reserved = M64(&gpu, memory_reserved_bytes);
    memory->used = M64(&gpu, memory_used_bytes);
    memory->free = memory->total - memory->reserved - memory->used;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t *memory) {
    READ(device, gpu);
    NEED(memory);
    memory->bar1Total = 128ULL << 30;
    memory->bar1Used = 0;
    memory->bar1Free = memory->bar1Total;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates) {
    READ(device, gpu);
    NEED(rates);
    rates->gpu = M32(&gpu, gpu_util_pct);
    rates->memory = M32(&gpu, mem_util_pct);
    return NVML_SUCCESS;
}

/* These engines are there and idle: LLMs use none of them. */
#define IDLE_ENGINE(name)                                                                 \
    EXPORT nvmlReturn_t name(nvmlDevice_t device, unsigned *busy, unsigned *period_us) {  \
        READ(device, gpu);                                                                \
        if (!busy || !period_us)                                                          \
            return NVML_ERROR_INVALID_ARGUMENT;                                           \
        *busy = 0;                                                                        \
        *period_us = 100000;                                                              \
        return NVML_SUCCESS;                                                              \
    }
IDLE_ENGINE(nvmlDeviceGetEncoderUtilization)
IDLE_ENGINE(nvmlDeviceGetDecoderUtilization)
IDLE_ENGINE(nvmlDeviceGetJpgUtilization)
IDLE_ENGINE(nvmlDeviceGetOfaUtilization)

static nvmlReturn_t processes(nvmlDevice_t device, unsigned *count, void *infos, int version) {
    READ(device, gpu);
    NEED(count);
    unsigned room = *count, found = M32(&gpu, num_processes);
    if (found > LAYOUT_MAX_PROCESSES)
        found = LAYOUT_MAX_PROCESSES;
    *count = found;
    if (room < found || (found && !infos))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned index = 0; index < found; index++) {
        const unsigned char *entry = gpu.measured + MEASURED_processes + index * PROCESS_SIZE;
        if (version == 1) {
            nvmlProcessInfo_v1_t *info = (nvmlProcessInfo_v1_t *)infos + index;
            info->pid = u32(entry, PROCESS_pid);
            info->usedGpuMemory = u64(entry, PROCESS_used_bytes);
        } else {
            nvmlProcessInfo_v2_t *info = (nvmlProcessInfo_v2_t *)infos + index;
            info->pid = u32(entry, PROCESS_pid);
            info->usedGpuMemory = u64(entry, PROCESS_used_bytes);
            info->gpuInstanceId = info->computeInstanceId = 0xFFFFFFFFu;
        }
    }
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned *count,
                                                         nvmlProcessInfo_v1_t *infos) {
    return processes(device, count, infos, 1);
}
EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count,
                                                            nvmlProcessInfo_v2_t *infos) {
    return processes(device, count, infos, 2);
}
EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count,
                                                            nvmlProcessInfo_v2_t *infos) {
    return processes(device, count, infos, 3);
}

#define NO_PROCESSES(name)                                                              \
    EXPORT nvmlReturn_t name(nvmlDevice_t device, unsigned *count, void *infos) {       \
        READ(device, gpu);                                                              \
        (void)infos;                                                                    \
        NEED(count);                                                                    \
        *count = 0;                                                                     \
        return NVML_SUCCESS;                                                            \
    }
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3)

EXPORT nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device,
                                                    nvmlProcessUtilizationSample_t *samples,
                                                    unsigned *count, unsigned long long since_us) {
    READ(device, gpu);
    NEED(count);
    unsigned room = *count, found = M32(&gpu, num_processes);
    if (found > LAYOUT_MAX_PROCESSES)
        found = LAYOUT_MAX_PROCESSES;
    unsigned long long now_us = (unsigned long long)realtime_us();
    *count = found;
    if (!found || since_us > now_us)
        return NVML_ERROR_NOT_FOUND;
    if (room < found || !samples)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned index = 0; index < found; index++) {
        const unsigned char *entry = gpu.measured + MEASURED_processes + index * PROCESS_SIZE;
        memset(&samples[index], 0, sizeof samples[index]);
        samples[index].pid = u32(entry, PROCESS_pid);
        samples[index].timeStamp = now_us;
        samples[index].smUtil = M32(&gpu, gpu_util_pct) / found;
        samples[index].memUtil = M32(&gpu, mem_util_pct) / found;
    }
    return NVML_SUCCESS;
}

/* ---- modes and links ---- */

GETTER(nvmlDeviceGetPersistenceMode, unsigned, C32(&gpu, persistence))
GETTER(nvmlDeviceGetComputeMode, unsigned, 0)
GETTER(nvmlDeviceGetDisplayMode, unsigned, 0)
GETTER(nvmlDeviceGetDisplayActive, unsigned, 0)
GETTER(nvmlDeviceGetMaxMigDeviceCount, unsigned, 0)
/* 9 is Hopper, the first with generation 5. */
GETTER(nvmlDeviceGetMaxPcieLinkGeneration, unsigned, M32(&gpu, architecture) >= 9 ? 5 : 4)
GETTER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, M32(&gpu, architecture) >= 9 ? 5 : 4)
GETTER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, 16)
GETTER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, 16)

EXPORT nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, unsigned mode) {
    READ(device, gpu);
    return set_control(device, CONTROL_persistence, mode ? 1 : 0);
}
EXPORT nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, unsigned counter,
                                                unsigned *kib_per_s) {
    READ(device, gpu);
    if (!kib_per_s || counter > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    *kib_per_s = 0;
    return NVML_SUCCESS;
}
EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned type, unsigned which,
                                                unsigned long long *count) {
    READ(device, gpu);
    if (!count || type > 1 || which > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = 0;
    return NVML_SUCCESS;
}
