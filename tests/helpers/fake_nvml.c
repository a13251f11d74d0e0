/* Stands in for libnvidia-ml.so.1, so that the real pynvml can be driven without a GPU.

   One GPU whose power is a square wave: 100 W and 200 W in turn, a second each.  What fails is set by
   environment variables, read at every call: FAKE_NVML_NO_COUNTER, FAKE_NVML_LOST_AFTER (seconds after
   nvmlInit), FAKE_NVML_NO_INSTANT (power averages over a second, as before driver 530), FAKE_NVML_PID
   (the process that the driver lists; default: the caller), FAKE_NVML_NOW (the time in seconds, in place of
   the clock). */

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, GPU_IS_LOST = 15 };

typedef struct { unsigned int pid; unsigned long long used; unsigned int instance, compute; } Process;
typedef struct {
  unsigned int field, scope;
  long long timestamp, latency;
  unsigned int type;
  int code;
  union { unsigned int milliwatts; unsigned long long bits; } value;
} Field;

static double started;

static double now(void) {
  const char *set = getenv("FAKE_NVML_NOW");
  if (set) return atof(set);
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int lost(void) {
  const char *after = getenv("FAKE_NVML_LOST_AFTER");
  return after && now() - started > atof(after) ? GPU_IS_LOST : SUCCESS;
}

static int named(char *text, unsigned int length, const char *value) {
  strncpy(text, value, length);
  return SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) { started = now(); return SUCCESS; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "Not Supported"; }
int nvmlSystemGetDriverVersion(char *text, unsigned int length) { return named(text, length, "000.00"); }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  *device = &started;
  return strcmp(uuid, "GPU-simulated") ? NOT_FOUND : SUCCESS;
}

int nvmlDeviceGetName(void *device, char *text, unsigned int length) {
  return named(text, length, "Simulated Square Wave");
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
  if (getenv("FAKE_NVML_NO_COUNTER")) return NOT_SUPPORTED;
  double t = now(), whole = 2 * (double)(long)(t / 2), rest = t - whole;
  double joules = 150 * whole + (rest < 1 ? 100 * rest : 100 + 200 * (rest - 1));
  *millijoules = (unsigned long long)(1000 * joules);
  return lost();
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *milliwatts) {
  *milliwatts = (long)now() % 2 ? 200000 : 100000;
  return lost();
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *celsius) {
  *celsius = 47;
  return lost();
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned int *milliwatts) {
  *milliwatts = 250000;
  return SUCCESS;
}

int nvmlDeviceGetFieldValues(void *device, int count, Field *fields) {
  fields[0].value.bits = 0;
  fields[0].code = getenv("FAKE_NVML_NO_INSTANT") || fields[0].field != 186 ? NOT_SUPPORTED : SUCCESS;
  if (fields[0].code == SUCCESS) return nvmlDeviceGetPowerUsage(device, &fields[0].value.milliwatts);
  return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, Process *processes) {
  if (*count < 1) { *count = 1; return 7; /* insufficient size */ }
  const char *pid = getenv("FAKE_NVML_PID");
  *count = 1;
  processes[0].pid = pid ? atoi(pid) : getpid();
  processes[0].used = 500ull << 20;
  return SUCCESS;
}
