"""LightningModules that define which parameters train and where the weights of the device's last layer come from."""
