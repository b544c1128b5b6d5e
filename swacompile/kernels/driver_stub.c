/* Stands in for the CUDA driver where kernels are built without a GPU. Every call fails with CUDA_ERROR_NO_DEVICE (100). */
int cuDeviceGetName(void) { return 100; }
int cuFuncSetAttribute(void) { return 100; }
int cuGetErrorName(void) { return 100; }
int cuGetErrorString(void) { return 100; }
int cuLaunchKernelEx(void) { return 100; }
int cuModuleGetFunction(void) { return 100; }
int cuModuleLoadData(void) { return 100; }
int cuModuleUnload(void) { return 100; }
int cuTensorMapEncodeTiled(void) { return 100; }
