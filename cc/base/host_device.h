// KVPAGE_HOST_DEVICE: functions that CUDA kernels share with the host.
#ifndef KVPAGE_BASE_HOST_DEVICE_H_
#define KVPAGE_BASE_HOST_DEVICE_H_

#ifdef __CUDACC__
#define KVPAGE_HOST_DEVICE __host__ __device__
#else
#define KVPAGE_HOST_DEVICE
#endif

#endif  // KVPAGE_BASE_HOST_DEVICE_H_
